"""The recipe: what was asked, validated and frozen, with every fault told by file, line and key."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError

import merger.methods  # noqa: F401 registers every method
from merger.errors import RecipeError, nearest
from merger.pipeline.inputs import StageInput
from merger.pipeline.parameters import Place
from merger.pipeline.registry import written
from merger.pipeline.stages import Bound, bind, expand
from merger.recipe.document import Document, KeyPath, key_path, parse, read, value_of
from merger.recipe.faults import said
from merger.recipe.open_values import marks
from merger.recipe.sections import (
    Calibration,
    Choice,
    Evaluation,
    Expert,
    Output,
    Rule,
    Search,
    Source,
    TextSource,
    expert_name,
    source_of,
    text_sources,
)
from merger.recipe.stages import stages_of


class Recipe(Choice):
    """A merge: inputs, method, rules, output."""

    base: Annotated[Source, BeforeValidator(source_of, json_schema_input_type=str | Source)]
    experts: dict[
        Annotated[str, AfterValidator(expert_name)],
        Annotated[Expert, BeforeValidator(source_of, json_schema_input_type=str | Expert)],
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
        """The paths that an output may lie beside but never replace: the recipe's folder, texts, statistics."""
        texts = [source.file for source in self._text_sources()]
        statistics = [] if self.calibration is None else self.calibration.stats.values()
        return [self._folder, *self._here([*texts, *statistics])]

    def _text_sources(self) -> Iterator[TextSource]:
        """All sources of text, of calibration and of evaluation."""
        if self.calibration is not None:
            data = self.calibration.data
            for value in data.values() if isinstance(data, dict) else [data or ()]:
                yield from text_sources(value)
        if self.evaluation is not None:
            for value in self.evaluation.data.values():
                yield from text_sources(value)

    def _here(self, names: Iterable[str | None]) -> list[Path]:
        paths = [self._folder / os.path.expanduser(name) for name in names if name is not None]
        return [path for path in paths if path.exists()]

    def spelled_out(self) -> dict[str, Any]:
        """The recipe with every default written down, as the manifest keeps it: all that decides the merge."""
        apart = {"method", "parameters", "pipeline", "rules", "evaluation", "search"}
        plain = self.model_dump(mode="json", by_alias=True, exclude=apart)
        first = {key: plain.pop(key) for key in ("base", "experts")}
        return {**first, **_spelled_choice(self), "rules": [_spelled_rule(rule) for rule in self.rules], **plain}

    def choices(self) -> Iterator[Choice]:
        """The recipe's own choice, then each rule's."""
        yield self
        yield from self.rules


def _spelled_rule(rule: Rule) -> dict[str, Any]:
    plain = rule.model_dump(mode="json", include={"tensors", "kinds", "use"}, exclude_none=True)
    return plain if rule.use else {**plain, **_spelled_choice(rule)}


def _spelled_choice(choice: Choice) -> dict[str, Any]:
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
        told = said(error, lambda path: Search.model_fields, document.value["search"])
        raise RecipeError([document.fault(("search", *path), message) for path, message in told]) from None


def overridden(document: Document, overrides: Iterable[str]) -> Document:
    """The document with the changes of `--set`; RecipeError for an argument that is no change."""
    for override in overrides:
        key, equals, value = override.partition("=")
        try:
            path = key_path(key.strip())
        except ValueError:
            path = ()
        if not equals or not path:
            raise RecipeError(f"--set {override}: expected key.path=value, with a key that holds a dot in quotes")
        try:
            document = document.changed(path, value_of(value, f"--set {key}"))
        except KeyError as missing:
            raise RecipeError(f"--set {override}: there is no {missing.args[0]} in the list") from None
    return document


def _build(document: Document, overrides: Sequence[str]) -> Recipe:
    if open_values := list(marks(document.value)):
        raise RecipeError([document.fault(path, _UNDECIDED) for path, _ in open_values])
    faults: list[tuple[KeyPath, str]] = []
    recipe = None
    try:
        recipe = Recipe(**document.value)
    except ValidationError as error:
        faults += said(error, _fields, document.value)
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
        return [_without_text(recipe), *found]
    if len({source.follows_merge for source in _inputs(recipe) if source.granularity == "block"}) > 1:
        found.append(((), "inputs: own in one method and merged in another; all text goes one way through the model"))
    with_data = set(given.data) if isinstance(given.data, dict) else set(experts if given.data else ())
    from_text = any(source.follows_merge for source in _inputs(recipe))
    lacking = [name for name in experts if name not in (with_data if from_text else with_data | set(given.stats))]
    if lacking:
        what = "no data, as inputs behind merged blocks need it," if from_text else "no data and no stats"
        found.append((("calibration",), f"{what} for {', '.join(lacking)}"))
    return found


def _without_text(recipe: Recipe) -> tuple[KeyPath, str]:
    """The fault of the first choice that needs text where the recipe has none."""
    places: list[KeyPath] = [(), *(("rules", i) for i in range(len(recipe.rules)))]
    choices = zip(places, recipe.choices(), strict=True)
    place, choice = next(
        (place, choice) for place, choice in choices if any(source.needs_text for source in _inputs(recipe, choice))
    )
    files = ", ".join(f"{expert}: {expert}.jsonl" for expert in list(recipe.experts)[:3])
    return (
        (*place, "pipeline" if choice.pipeline else "method"),
        f"looks at layer inputs; add `calibration: {{data: {{{files}}}}}`, text of each expert (docs/calibration.md)",
    )


def is_calibrated(recipe: Recipe) -> bool:
    """Whether a stage takes an input that is made from calibration text."""
    return any(source.needs_text for source in _inputs(recipe))


def _inputs(recipe: Recipe, *choices: Choice) -> set[StageInput]:
    """The inputs that the stages of some choices, or of all, take beside the weights."""
    return {source for bound in _bounds(recipe, *choices) for source in bound.inputs}


def _bounds(recipe: Recipe, *choices: Choice) -> list[Bound]:
    """The stages of some choices, or of all, as they are for a matrix."""
    place = Place(tuple(recipe.experts))
    try:
        return [
            bind(expanded, place)
            for choice in choices or recipe.choices()
            for stage in choice.stages
            for expanded in expand(stage, "linear", place.experts)
        ]
    except ValueError:  # already told as a fault of its own
        return []


_SECTIONS: dict[str | int, Any] = {
    "base": Source,
    "experts": Expert,
    "output": Output,
    "calibration": Calibration,
    "evaluation": Evaluation,
    "search": Search,
    "rules": Rule,
}


def _fields(path: KeyPath) -> set[str]:
    """The keys that are valid at ``path`` of the recipe."""
    is_text = len(path) > 2 and path[1] == "data" and path[0] in ("calibration", "evaluation")
    section = TextSource if is_text else _SECTIONS.get(path[0], Recipe) if path else Recipe
    return set(section.model_fields)


# --- for editors ----------------------------------------------------------------------------------


def portable_location(source: str) -> str:
    """A model's name without the machine's folders: an absolute path keeps only its last part."""
    return Path(source).name if Path(source).expanduser().is_absolute() else source
