"""The recipe: what was asked, validated and frozen, with every fault told by file, line and key."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

import merger.methods  # noqa: F401 registers every method
from merger.document import Document, KeyPath, key_path, parse, read, value_of
from merger.errors import RecipeError, nearest
from merger.methods._parameters import Number, Pinned, Place, resolve
from merger.methods._registry import ENTRIES, SCORES, Stage, checked, parameter_names, parameters, schema, written
from merger.pipeline import bind, expand

Kind = Literal["linear", "conv1d", "head", "tied", "embedding", "vector", "expert3d", "other", "buffer"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
_SIZE = re.compile(r"^\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kKmMgGtT]?)(i?)[bB]?\s*$")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _location(text: str) -> str:
    parts = [len(os.fsencode(part)) for part in text.split("/")]
    if max(parts) > 255 or sum(parts) > 2000 or re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"is {text[:80]!r}, which no folder can be named")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise ValueError(f"there is no home folder {text.partition('/')[0]}")
    return text


Location = Annotated[str, Field(min_length=1), AfterValidator(_location)]


class Source(_Strict):
    """A checkpoint: a folder, or a Hub repository with an optional @revision, and an adapter on top of it."""

    model: Location
    adapter: Location | None = None


class Expert(Source):
    """A fine-tune of the base, or an adapter for it."""

    weight: Number = Fraction(1)


def _source(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def byte_size(value: Any) -> Any:
    """5GB, 500 MiB or a plain number of bytes, as a number of bytes; anything else as it is."""
    if isinstance(value, str) and (found := _SIZE.match(value)):
        step = 1024 if found[3] else 1000
        return int(Fraction(found[1]) * step ** (" kmgt".index(found[2].lower() or " ")))
    return value


class Output(_Strict):
    """Where the merged checkpoint goes, and in what form."""

    path: Location
    dtype: DType | None = None  # None: that of each base tensor
    shard_size: Annotated[int, BeforeValidator(byte_size, json_schema_input_type=int | str), Field(ge=1)] = (
        5_000_000_000
    )
    tokenizer: str | None = None  # base or an expert; None: the base, or who added tokens to it


class Calibration(_Strict):
    """The text that goes through the experts, or the statistics that came out of it earlier."""

    data: Location | dict[str, Location] | None = None
    stats: dict[str, Location] = Field(default_factory=dict)
    samples: Annotated[int, Field(ge=1)] | dict[str, Annotated[int, Field(ge=1)]] = 100
    max_tokens: int = Field(2048, ge=1)
    weighting: Literal["token", "sample"] = "token"
    skip_first_tokens: int = Field(0, ge=0)
    calib_text: Literal["input", "input+target"] = "input"


def _expert_name(name: str) -> str:
    if name == "base" or not _NAME.match(name):
        raise ValueError("an expert's name is letters, digits, _ . -, and not `base`")
    return name


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return text


class _Choice(_Strict):
    """A method with its parameters, or a pipeline of stages."""

    method: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    pipeline: list[str | dict[str, Any]] | None = None
    _stages: tuple[Stage, ...] = PrivateAttr(())

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What was chosen, with validated parameters; a named method is one entry, not yet expanded."""
        return self._stages


class Rule(_Choice):
    """What happens to the tensors whose name or kind it matches; the first rule that matches wins."""

    tensors: Annotated[str, AfterValidator(_pattern)] | None = None  # a regular expression, found anywhere in the name
    kinds: list[Kind] | None = None
    use: str | None = None  # `base` or an expert: copied, not merged

    @model_validator(mode="after")
    def _says_what_it_is_about(self) -> Rule:
        if self.tensors is None and self.kinds is None:
            raise ValueError("expected tensors: (a regular expression) or kinds:, to say what it is about")
        return self

    def matches(self, name: str, kind: str) -> bool:
        """Whether this rule is about the tensor ``name``."""
        named = self.tensors is None or re.search(self.tensors, name) is not None
        return named and (self.kinds is None or kind in self.kinds)


class Recipe(_Choice):
    """A merge: inputs, method, rules, output."""

    base: Annotated[Source, BeforeValidator(_source, json_schema_input_type=str | Source)]
    experts: dict[
        Annotated[str, AfterValidator(_expert_name)],
        Annotated[Expert, BeforeValidator(_source, json_schema_input_type=str | Expert)],
    ] = Field(min_length=1)
    rules: list[Rule] = Field(default_factory=list)
    missing: Literal["error", "zero"] = "error"
    extra_rows: Literal["keep", "drop"] = "keep"
    calibration: Calibration | None = None
    output: Output
    seed: int = Field(0, ge=0)
    _folder: Path = PrivateAttr(Path())
    _overrides: tuple[str, ...] = PrivateAttr(())

    @property
    def folder(self) -> Path:
        """What relative paths are relative to: the recipe's own folder."""
        return self._folder

    @property
    def overrides(self) -> tuple[str, ...]:
        """The `--set` arguments that changed it."""
        return self._overrides

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Reads and checks a recipe; RecipeError with all faults at once, each with its line and key."""
        return _build(_overridden(read(Path(path)), overrides), overrides)

    @classmethod
    def parse(cls, text: str | Mapping[str, Any], folder: str | Path = ".") -> Recipe:
        """A recipe from YAML text or from a dictionary; relative paths start at ``folder``."""
        if isinstance(text, str):
            return _build(parse(text, "recipe", Path(folder).resolve()), ())
        return _build(Document("recipe", Path(folder).resolve(), dict(text)), ())

    def folders(self) -> list[Path]:
        """The models' and adapters' folders, as far as they are on this machine."""
        sources = [self.base, *self.experts.values()]
        return self._here(name for source in sources for name in (source.model, source.adapter))

    def surroundings(self) -> list[Path]:
        """What an output may lie beside but never replace: the recipe's folder, calibration data, statistics."""
        given = self.calibration
        if given is None:
            return [self._folder]
        data = given.data.values() if isinstance(given.data, dict) else [given.data]
        return [self._folder, *self._here([*data, *given.stats.values()])]

    def _here(self, names: Iterable[str | None]) -> list[Path]:
        paths = [self._folder / os.path.expanduser(name) for name in names if name is not None]
        return [path for path in paths if path.exists()]

    def spelled_out(self) -> dict[str, Any]:
        """The recipe with every default written down, as the manifest keeps it."""
        plain = self.model_dump(mode="json", by_alias=True, exclude={"method", "parameters", "pipeline", "rules"})
        first = {key: plain.pop(key) for key in ("base", "experts")}
        return {**first, **_spelled_choice(self), "rules": [_spelled_rule(rule) for rule in self.rules], **plain}

    def choices(self) -> Iterator[_Choice]:
        """The recipe's own choice, then each rule's."""
        yield self
        yield from self.rules


def _spelled_rule(rule: Rule) -> dict[str, Any]:
    plain = rule.model_dump(mode="json", include={"tensors", "kinds", "use"}, exclude_none=True)
    return plain if rule.use else {**plain, **_spelled_choice(rule)}


def _spelled_choice(choice: _Choice) -> dict[str, Any]:
    if choice.pipeline is not None:
        return {"pipeline": [written(stage) for stage in choice.stages]}
    ((name, given),) = written(choice.stages[0]).items()
    return {"method": name, "parameters": given}


# --- building: every fault at once ----------------------------------------------------------------


def _overridden(document: Document, overrides: Iterable[str]) -> Document:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {override}: expected key.path=value")
        try:
            document = document.changed(key_path(key.strip()), value_of(value))
        except KeyError as missing:
            raise RecipeError(f"--set {override}: there is no {missing} in the list") from None
    return document


def _build(document: Document, overrides: Sequence[str]) -> Recipe:
    faults: list[tuple[KeyPath, str]] = []
    recipe = None
    try:
        recipe = Recipe(**document.value)
    except ValidationError as error:
        faults += _said(error, _fields)
    except TypeError:
        faults += [((str(key),), "is no text; quote it") for key in document.value if not isinstance(key, str)]
    raw = document.value
    experts = raw["experts"] if isinstance(raw.get("experts"), dict) else {}
    weights = {str(name): recipe.experts[name].weight if recipe else Fraction(1) for name in experts}
    rules = raw["rules"] if isinstance(raw.get("rules"), list) else []
    places: list[tuple[KeyPath, Any]] = [((), raw), *((("rules", i), rule) for i, rule in enumerate(rules))]
    chosen = [_stages(node, path, weights, faults) for path, node in places if isinstance(node, Mapping)]
    if recipe is not None:
        for choice, stages in zip(recipe.choices(), chosen, strict=True):
            choice._stages = tuple(stages)
        faults += _conflicts(recipe)
        recipe._folder, recipe._overrides = document.folder, tuple(overrides)
    if faults or recipe is None:
        placed = sorted(dict.fromkeys(faults), key=lambda fault: document.line(fault[0]))
        raise RecipeError([document.fault(path, message) for path, message in placed])
    return recipe


def _stages(
    node: Mapping[str, Any], path: KeyPath, experts: Mapping[str, Number], faults: list[tuple[KeyPath, str]]
) -> list[Stage]:
    """The stages of one choice for experts of these weights; what is wrong with it goes to ``faults``."""
    asked = [key for key in ("method", "pipeline", "use") if node.get(key) is not None]
    if len(asked) != 1:
        expected = "one of method, pipeline, use" if path else "a method or a pipeline"
        faults.append(((*path, *asked[-1:]), f"expected {expected}, found {' and '.join(asked) or 'none'}"))
        return []
    if asked == ["use"]:
        if node["use"] not in ("base", *experts):
            near = nearest(str(node["use"]), ["base", *experts])
            faults.append(((*path, "use"), f"there is no expert {node['use']!r}; {near}"))
        return []
    before = len(faults)
    stages = []
    for where, name, given in _named(node, path, faults):
        table = {**ENTRIES, **SCORES} if asked == ["method"] else _only_stages()
        if name not in table:
            here = (*path, "method") if asked == ["method"] else where
            faults.append((here, _no_such(name, table, asked[0])))
            continue
        try:
            stages.append(checked(name, given))
        except ValidationError as error:
            faults += [((*where, *inner), message) for inner, message in _said(error, partial(_keys, name, given))]
            continue
        faults += [((*where, key), message) for key, message in _unsuited(stages[-1], experts)]
    if len(faults) == before and experts and (stages or isinstance(node.get("pipeline"), list)):
        faults += _sequence_faults(stages, path, asked[0], experts)
    return stages


def _unsuited(stage: Stage, experts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Parameters that name no expert of this recipe, or leave one out."""
    for name, (annotation, _) in parameters(stage.func).items():
        try:
            if stage.keywords[name] != "auto":
                resolve(annotation, stage.keywords[name], Place(tuple(experts)))
        except ValueError as error:
            yield name.rstrip("_"), str(error)


def _only_stages() -> dict[str, Any]:
    return {**{name: e for name, e in ENTRIES.items() if e.kind != "method"}, **SCORES}


def _no_such(name: str, table: Mapping[str, Any], where: str) -> str:
    if where == "pipeline" and name in ENTRIES:
        return f"{name} is a method; a pipeline is made of stages (`merger methods {name}` shows which)"
    return f"there is no {'method' if where == 'method' else 'stage'} {name!r}; {nearest(name, table)}"


def _named(
    node: Mapping[str, Any], path: KeyPath, faults: list[tuple[KeyPath, str]]
) -> Iterator[tuple[KeyPath, str, dict[str, Any]]]:
    """Where each stage's parameters stand, its name, and the parameters."""
    if node.get("pipeline") is None:
        given = node.get("parameters") or {}
        if isinstance(node["method"], str) and isinstance(given, Mapping):
            yield (*path, "parameters"), node["method"], dict(given)
        return
    if node.get("parameters"):
        faults.append(((*path, "parameters"), "belongs to a method; in a pipeline each stage has its own"))
    for i, each in enumerate(node["pipeline"] if isinstance(node["pipeline"], list) else []):
        here = (*path, "pipeline", i)
        if isinstance(each, str):
            yield here, each, {}
        elif isinstance(each, Mapping) and len(each) == 1 and isinstance(next(iter(each)), str):
            ((name, given),) = each.items()
            if given is None or isinstance(given, Mapping):
                yield (*here, name), name, dict(given or {})
            else:
                faults.append(((*here, name), "expected parameters, as in {density: 0.5}"))
        else:
            faults.append((here, "expected a stage's name, or {stage: {parameter: value}}"))


def _sequence_faults(
    stages: Sequence[Stage], path: KeyPath, where: str, experts: Mapping[str, Number]
) -> list[tuple[KeyPath, str]]:
    """Whether the stages make one task vector of K, and their parameters go together for these experts."""
    here = (*path, where)
    found: list[str] = []
    for kind in ("linear", "vector", "embedding", "head"):
        for depth in (Fraction(0), Fraction(1, 2), Fraction(1)):
            try:
                weights = tuple(resolve(Number, weight, Place((), depth=depth)) for weight in experts.values())
                place = Place(tuple(experts), weights, depth)
                expanded = [each for stage in stages for each in expand(stage, kind, place.experts)]
                bounds = [bind(stage, place) for stage in expanded]
            except ValueError as error:
                found.append(str(error))
                continue
            found += _order_faults([bound.entry.kind for bound in bounds])
            found += [
                f"{b.entry.name} merges exactly {b.entry.experts} experts, not {len(experts)}"
                for b in bounds
                if b.entry.experts not in (None, len(experts))
            ]
            found += [
                f"scope: global ranks the whole model at once, so {name} cannot vary over depth"
                for stage in expanded
                if stage.keywords.get("scope") == "global"
                for name, value in stage.keywords.items()
                if _varies(value)
            ]
    return [(here, message) for message in dict.fromkeys(found)]


def _varies(value: Any) -> bool:
    several = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(each, list) and isinstance(each[0], Fraction) for each in several)


def _order_faults(kinds: Sequence[str]) -> list[str]:
    mergers = [i for i, kind in enumerate(kinds) if kind == "merger"]
    if len(mergers) != 1:
        mergers_known = ", ".join(name for name, entry in ENTRIES.items() if entry.kind == "merger")
        return [f"expected exactly one merger among the stages, found {len(mergers)}; mergers are {mergers_known}"]
    if "sparsifier" in kinds[mergers[0] :]:
        return ["a sparsifier stands after the merger; it thins each expert's task vector, so it must come before"]
    return []


def _conflicts(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    """What is wrong between the parts of a recipe that is well formed."""
    found: list[tuple[KeyPath, str]] = []
    if recipe.output.tokenizer not in (None, "base", *recipe.experts):
        near = nearest(str(recipe.output.tokenizer), ["base", *recipe.experts])
        found.append((("output", "tokenizer"), f"there is no expert {recipe.output.tokenizer!r}; {near}"))
    return found + _calibration_faults(recipe)


def _calibration_faults(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    found: list[tuple[KeyPath, str]] = []
    experts, given = tuple(recipe.experts), recipe.calibration
    if given is not None:
        by_expert = {"data": given.data, "stats": given.stats, "samples": given.samples}
        for key, value in by_expert.items():
            for name in value if isinstance(value, dict) else ():
                if name not in experts:
                    found.append((("calibration", key, name), f"there is no such expert; {nearest(name, experts)}"))
    if not is_calibrated(recipe):
        return found
    if given is None:
        return [
            ((), "its saliency needs calibration: {data: ...}, or a score that looks at no inputs"),
            *found,
        ]
    have = set(given.stats) | (set(given.data) if isinstance(given.data, dict) else set(experts if given.data else ()))
    lacking = [name for name in experts if name not in have]
    if lacking:
        found.append((("calibration",), f"no data and no stats for {', '.join(lacking)}"))
    return found


def is_calibrated(recipe: Recipe) -> bool:
    """Whether any stage looks at what enters the layers."""
    place = Place(tuple(recipe.experts))
    try:
        return any(
            bind(each, place).calibrated
            for choice in recipe.choices()
            for stage in choice.stages
            for each in expand(stage, "linear", place.experts)
        )
    except ValueError:  # already told as a fault of its own
        return False


# --- pydantic's errors in this tool's words -------------------------------------------------------

_TAGS = {"one", "by_depth", "by_expert", "auto", "pinned", "named", "listed"}
_MAPPING, _TEXT, _WHOLE, _SWITCH = "keys and values", "text", "a whole number", "true or false"
_EXPECTED = {  # by pydantic's name of the error
    "dict_type": _MAPPING, "model_type": _MAPPING, "list_type": "a list", "string_type": _TEXT,
    "string_too_short": _TEXT, "int_type": _WHOLE, "int_from_float": _WHOLE, "int_parsing": _WHOLE,
    "bool_type": _SWITCH, "bool_parsing": _SWITCH,
}  # fmt: skip
_FORMS = {"one": "a number", "by_depth": "a list of them over depth", "by_expert": "a map by expert", "auto": "auto"}
_LIMITS = {"less_than_equal": ("le", "at most"), "greater_than_equal": ("ge", "at least")}


def _said(error: ValidationError, keys: Callable[[KeyPath], Iterable[str]]) -> Iterator[tuple[KeyPath, str]]:
    """Each error's key path in the file, and one sentence about it; ``keys`` gives the valid ones at a path."""
    sentences: dict[KeyPath, str] = {}
    for each in error.errors(include_url=False):
        path = tuple(part for part in each["loc"] if part not in _TAGS and not _is_type_tag(part))
        sentence = _sentence(dict(each), path, keys)
        known = sentences.get(path, "").partition(", expected ")[0]
        if known and sentence.startswith(f"{known}, expected "):  # the branches of a union
            sentence = sentence.replace(f"{known}, expected", f"{sentences[path]} or", 1)
        sentences[path] = sentence
    yield from sentences.items()


def _is_type_tag(part: Any) -> bool:
    """Names that pydantic puts into a path for a branch of a union, such as dict[str,str]."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "constrained-int", "function-before"))


def _sentence(each: dict[str, Any], path: KeyPath, keys: Callable[[KeyPath], Iterable[str]]) -> str:
    kind, given, context = each["type"], each["input"], each.get("ctx", {})
    found = "is empty" if given in (None, "") else f"is {_short(given)}"
    if kind == "extra_forbidden":
        return f"unknown key; {nearest(str(path[-1]), keys(path[:-1]))}"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        expected = [word.strip("' ") for word in re.split(r", | or ", context["expected"])]
        return f"{found}, expected {context['expected']}{_close(given, expected)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        return f"{found}, expected at least {context['min_length']} of them"
    if kind in _LIMITS:
        limit, words = _LIMITS[kind]
        return f"{found}, expected {words} {context[limit]}"
    if kind == "union_tag_invalid":
        forms = [_FORMS.get(tag.strip("'"), tag) for tag in context["expected_tags"].split(", ")]
        return f"{found}, expected {', '.join(forms[:-1])} or {forms[-1]}"
    if path[-1:] == ("shard_size",):
        return f"{found}, expected a size such as 5GB, 500MiB or a number of bytes"
    return f"{found}, expected {_EXPECTED[kind]}" if kind in _EXPECTED else f"{found}: {each['msg']}"


def _short(given: Any) -> str:
    """A value as a recipe has it, cut where it is long."""
    text = repr(float(given) if isinstance(given, Fraction) else given)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _close(given: Any, expected: list[str]) -> str:
    near = nearest(str(given), expected)
    return f"; {near}" if near.startswith("did") else ""


def _fields(path: KeyPath) -> set[str]:
    """The keys that are valid at ``path`` of the recipe."""
    fields: Any = Recipe
    for part in path:
        if isinstance(part, int) or part not in fields.model_fields:
            continue
        found = [m for m in (Source, Expert, Output, Calibration, Rule) if m.__name__.lower() == part.rstrip("s")]
        fields = found[0] if found else (Source if part == "base" else fields)
    return set(fields.model_fields)


def _keys(name: str, given: Mapping[str, Any], path: KeyPath) -> set[str]:
    """The keys that are valid at ``path`` of the parameters that were given to the stage ``name``."""
    if not path:
        return parameter_names(name)
    if path[0] == "score":  # written as {name: {parameter: value}}
        return {each.rstrip("_") for each in parameters(SCORES[next(iter(given["score"]))].function)}
    return set(Pinned.model_fields)


# --- for editors ----------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe: each method's parameters are checked as the method's own."""
    whole = Recipe.model_json_schema()
    whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    whole["title"] = "merger recipe"
    definitions = whole.setdefault("$defs", {})
    for entry in (*ENTRIES.values(), *SCORES.values()):
        one = schema(entry).model_json_schema(ref_template="#/$defs/{model}")
        definitions |= one.pop("$defs", {})
        definitions[f"parameters.{entry.name}"] = one
    of_top = definitions["parameters.top"]["properties"]
    for name in SCORES:  # a score's name stands for `top` with that score
        own = definitions[f"parameters.{name}"]
        own["properties"] = {**{key: each for key, each in of_top.items() if key != "score"}, **own["properties"]}
    definitions["stage"] = {
        "anyOf": [
            {"enum": sorted(_only_stages())},
            {
                "type": "object",
                "minProperties": 1,
                "maxProperties": 1,
                "additionalProperties": False,
                "properties": {
                    name: {"anyOf": [{"$ref": f"#/$defs/parameters.{name}"}, {"type": "null"}]}
                    for name in sorted(_only_stages())
                },
            },
        ],
        "description": "A stage's name, or {stage: {parameter: value}}.",
    }
    methods = sorted({**ENTRIES, **SCORES})
    for holder in (whole, definitions["Rule"]):
        holder["properties"]["method"] = {"enum": methods, "description": "A method, or a single stage."}
        holder["properties"]["pipeline"] = {"type": "array", "items": {"$ref": "#/$defs/stage"}}
        holder["allOf"] = [
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": {"properties": {"parameters": {"$ref": f"#/$defs/parameters.{name}"}}},
            }
            for name in methods
        ]
    return whole
