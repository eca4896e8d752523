"""The recipe: what was asked, validated and frozen, with every fault told by file, line and key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
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
from merger.errors import RecipeError, nearest
from merger.pipeline.inputs import StageInput
from merger.pipeline.parameters import Number, Place
from merger.pipeline.registry import Stage, written
from merger.pipeline.stages import Bound, bind, expand
from merger.recipe.document import Document, KeyPath, key_path, parse, read, value_of
from merger.recipe.faults import said
from merger.recipe.open_values import marks
from merger.recipe.stages import stages_of

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


class Evaluation(_Strict):
    """The held-out examples that models are judged by; no byte of a merge depends on them."""

    data: dict[str, Location] = Field(min_length=1)  # by task; one that is named as an expert is that expert's own
    samples: int = Field(100, ge=1)  # of each task at most; a search asks for as many of its own beside them
    max_tokens: int = Field(1024, ge=2)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # of the forward pass; None: what is fast here


class Search(_Strict):
    """How `merger search` looks for values where the recipe is marked with {search: ...}."""

    strategy: Literal["grid", "two-step", "random", "tpe", "cmaes"] = "grid"
    trials: Annotated[int, Field(ge=1)] | None = None  # for each variant; None: the whole grid
    objective: str = "kept"  # kept, worst, mean, loss, or a task
    samples: int = Field(32, ge=1)  # of each task, none of which the report is made on
    seed: int = Field(0, ge=0)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)  # keys of the recipe that each sets, by name


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
    evaluation: Evaluation | None = None
    search: Search | None = None
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
        return cls.of(overridden(read(Path(path)), overrides), overrides)

    @classmethod
    def of(cls, document: Document, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe that a document says, in which ``overrides`` are made already."""
        return _build(document, overrides)

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
        held_out = [] if self.evaluation is None else [*self.evaluation.data.values()]
        given = self.calibration
        if given is None:
            return [self._folder, *self._here(held_out)]
        data = given.data.values() if isinstance(given.data, dict) else [given.data]
        return [self._folder, *self._here([*data, *given.stats.values(), *held_out])]

    def _here(self, names: Iterable[str | None]) -> list[Path]:
        paths = [self._folder / os.path.expanduser(name) for name in names if name is not None]
        return [path for path in paths if path.exists()]

    def spelled_out(self) -> dict[str, Any]:
        """The recipe with every default written down, as the manifest keeps it: all that decides the merge."""
        apart = {"method", "parameters", "pipeline", "rules", "evaluation", "search"}
        plain = self.model_dump(mode="json", by_alias=True, exclude=apart)
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

_UNDECIDED = "is left open for `merger search`, which writes a recipe with the best value; or give one with --set"


def search_of(document: Document) -> Search:
    """The section ``search`` alone, of a recipe that is still open."""
    try:
        return Search.model_validate(document.value.get("search") or {})
    except ValidationError as error:
        told = said(error, lambda path: Search.model_fields)
        raise RecipeError([document.fault(("search", *path), message) for path, message in told]) from None


def overridden(document: Document, overrides: Iterable[str]) -> Document:
    """The document with what `--set` changes; RecipeError for an argument that is none."""
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
    if open_values := list(marks(document.value)):
        raise RecipeError([document.fault(path, _UNDECIDED) for path, _ in open_values])
    faults: list[tuple[KeyPath, str]] = []
    recipe = None
    try:
        recipe = Recipe(**document.value)
    except ValidationError as error:
        faults += said(error, _fields)
    except TypeError:
        faults += [((str(key),), "is no text; quote it") for key in document.value if not isinstance(key, str)]
    raw = document.value
    experts = raw["experts"] if isinstance(raw.get("experts"), dict) else {}
    weights = {str(name): recipe.experts[name].weight if recipe else Fraction(1) for name in experts}
    rules = raw["rules"] if isinstance(raw.get("rules"), list) else []
    places: list[tuple[KeyPath, Any]] = [((), raw), *((("rules", i), rule) for i, rule in enumerate(rules))]
    chosen = [stages_of(node, path, weights, faults) for path, node in places if isinstance(node, Mapping)]
    if recipe is not None:
        for choice, stages in zip(recipe.choices(), chosen, strict=True):
            choice._stages = tuple(stages)
        faults += _conflicts(recipe)
        recipe._folder, recipe._overrides = document.folder, tuple(overrides)
    if faults or recipe is None:
        placed = sorted(dict.fromkeys(faults), key=lambda fault: document.line(fault[0]))
        raise RecipeError([document.fault(path, message) for path, message in placed])
    return recipe


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
    if len({source.follows_merge for source in _inputs(recipe) if source.granularity == "block"}) > 1:
        found.append(((), "inputs: own in one method and merged in another; all text goes one way through the model"))
    with_data = set(given.data) if isinstance(given.data, dict) else set(experts if given.data else ())
    from_text = any(source.follows_merge for source in _inputs(recipe))
    lacking = [name for name in experts if name not in (with_data if from_text else with_data | set(given.stats))]
    if lacking:
        what = "no data, as inputs behind merged blocks need it," if from_text else "no data and no stats"
        found.append((("calibration",), f"{what} for {', '.join(lacking)}"))
    return found


def is_calibrated(recipe: Recipe) -> bool:
    """Whether a stage takes an input that is made from calibration text."""
    return any(source.needs_text for source in _inputs(recipe))


def _inputs(recipe: Recipe) -> set[StageInput]:
    """The inputs that the stages of the recipe take beside the weights."""
    return {source for bound in _bounds(recipe) for source in bound.inputs}


def _bounds(recipe: Recipe) -> list[Bound]:
    """All stages of the recipe, as they are for a matrix."""
    place = Place(tuple(recipe.experts))
    try:
        return [
            bind(each, place)
            for choice in recipe.choices()
            for stage in choice.stages
            for each in expand(stage, "linear", place.experts)
        ]
    except ValueError:  # already told as a fault of its own
        return []


def _fields(path: KeyPath) -> set[str]:
    """The keys that are valid at ``path`` of the recipe."""
    fields: Any = Recipe
    for part in path:
        if isinstance(part, int) or part not in fields.model_fields:
            continue
        found = [
            m
            for m in (Source, Expert, Output, Calibration, Evaluation, Search, Rule)
            if m.__name__.lower() == part.rstrip("s")
        ]
        fields = found[0] if found else (Source if part == "base" else fields)
    return set(fields.model_fields)


# --- for editors ----------------------------------------------------------------------------------


def portable_location(source: str) -> str:
    """A model's name without the machine's folders: an absolute path keeps only its last part."""
    return Path(source).name if Path(source).expanduser().is_absolute() else source
