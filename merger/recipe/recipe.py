"""The recipe: validated and frozen, with file, line and key of every fault."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError

import merger.methods  # noqa: F401 registers every method
from merger._display import name_list
from merger.errors import RecipeError, nearest
from merger.pipeline.inputs import StageInput
from merger.pipeline.parameters import Place
from merger.pipeline.registry import written
from merger.pipeline.stages import Bound, bind, expand
from merger.recipe.document import Document, KeyPath, key_path, parse, read, value_of
from merger.recipe.faults import translate_errors
from merger.recipe.open_values import marks
from merger.recipe.output_faults import output_faults
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
    TokenRow,
    expert_name,
    output_of,
    source_of,
    text_sources,
)
from merger.recipe.short_forms import experts_by_name, spell_out
from merger.recipe.stages import stages_of
from merger.recipe.vocabulary_faults import vocabulary_faults

_Expert = Annotated[Expert, BeforeValidator(source_of, json_schema_input_type=str | Expert)]
_ExpertsByName = Annotated[dict[str, _Expert], Field(min_length=1)]
_ExpertList = Annotated[list[_Expert], Field(min_length=1)]


class Recipe(Choice):
    """A merge: inputs, method, rules, output."""

    base: Annotated[Source, BeforeValidator(source_of, json_schema_input_type=str | Source)] = Field(
        description="The model that the experts were tuned from."
    )
    experts: Annotated[
        dict[Annotated[str, AfterValidator(expert_name)], _Expert],
        Field(min_length=1),
        BeforeValidator(experts_by_name, json_schema_input_type=_ExpertsByName | _ExpertList),
    ] = Field(description="Its fine-tunes by name, in merging order; or a list, where folders give the names.")
    rules: list[Rule] = Field(
        default_factory=list, description="Other methods for some tensors; the first rule that matches wins."
    )
    missing: Literal["error", "zero"] = Field(
        "error", description="What a tensor is that an expert lacks: an error, or a difference of zero."
    )
    extra_rows: Literal["keep", "drop"] = Field(
        "keep", description="Whether rows of a vocabulary that not all models have stay in the output."
    )
    tokenizer: str | None = Field(
        default=None,
        description="`base`, an expert or `union`, whose tokens the output has; rows are then matched by token. Left "
        "out, the tokenizer is the base's, or that of an expert that added tokens to it.",
    )
    tokens: dict[str, TokenRow] = Field(
        default_factory=dict, description="By token: one source for its row, in place of the merge."
    )
    calibration: Calibration | None = Field(
        default=None, description="Text of each expert, for methods that look at layer inputs."
    )
    evaluation: Evaluation | None = Field(
        default=None, description="Held-out examples for `merger eval` and `merger search`; decides no byte of a merge."
    )
    search: Search | None = Field(
        default=None, description="How `merger search` finds the values that the recipe leaves open."
    )
    output: Annotated[Output, BeforeValidator(output_of, json_schema_input_type=str | Output)] = Field(
        description="Where the merged checkpoint goes; a path alone is enough."
    )
    seed: int = Field(0, ge=0, description="Of methods that draw at random, and of the choice of texts.")
    _document: Document = PrivateAttr(Document("recipe", Path(), {}))
    _overrides: tuple[str, ...] = PrivateAttr(())

    def __repr__(self) -> str:
        stages = [name for stage in self.stages for name in written(stage)]
        experts = name_list(list(self.experts))
        return f"Recipe({' + '.join(stages)} of {experts}; base {self.base.model}, output {self.output.path})"

    __str__ = __repr__

    @property
    def folder(self) -> Path:
        """The recipe's folder, where relative paths start."""
        return self._document.folder

    def fault(self, path: KeyPath, message: str) -> str:
        """``file:line: key.path: message``, for a key of the recipe as it was written."""
        return self._document.fault(path, message)

    @property
    def named_tokenizer(self) -> str | None:
        """The tokenizer of the output that the recipe names: base, an expert or union."""
        return self.tokenizer or self.output.tokenizer

    @property
    def overrides(self) -> tuple[str, ...]:
        """The `--set` arguments that changed the recipe."""
        return self._overrides

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Reads and checks a recipe; raises RecipeError with all faults at once, each with its line and key."""
        return cls.of(overridden(read(Path(path)), overrides), overrides)

    @classmethod
    def of(cls, document: Document, overrides: Sequence[str] = ()) -> Recipe:
        """Builds the recipe of a document to which ``overrides`` have been applied."""
        return _build(document, overrides)

    @classmethod
    def parse(cls, text: str | Mapping[str, Any], folder: str | Path = ".") -> Recipe:
        """Builds a recipe from YAML text or from a dictionary; relative paths start at ``folder``."""
        if isinstance(text, str):
            return _build(parse(text, "recipe", Path(folder).resolve()), ())
        return _build(Document("recipe", Path(folder).resolve(), dict(text)), ())

    def folders(self) -> list[Path]:
        """Returns the folders of models and adapters that exist on this machine."""
        sources = [self.base, *self.experts.values()]
        return self._existing_paths(name for source in sources for name in (source.model, source.adapter))

    def surroundings(self) -> list[Path]:
        """Returns the paths that an output must not replace: the recipe's folder, texts, statistics."""
        texts = [source.file for source in self._text_sources()]
        statistics = [] if self.calibration is None else self.calibration.stats.values()
        return [self.folder, *self._existing_paths([*texts, *statistics])]

    def _text_sources(self) -> Iterator[TextSource]:
        """Yields the sources of text of calibration and of evaluation."""
        if self.calibration is not None:
            data = self.calibration.data
            for value in data.values() if isinstance(data, dict) else [data or ()]:
                yield from text_sources(value)
        if self.evaluation is not None:
            for value in self.evaluation.data.values():
                yield from text_sources(value)

    def _existing_paths(self, names: Iterable[str | None]) -> list[Path]:
        paths = [self.folder / os.path.expanduser(name) for name in names if name is not None]
        return [path for path in paths if path.exists()]

    def spelled_out(self) -> dict[str, Any]:
        """Returns the recipe with all defaults, as the manifest stores it: everything that decides the merge.

        Keys of later versions are left out where they are absent, so that an older recipe has the same record.
        """
        separate_keys = {"method", "parameters", "pipeline", "rules", "evaluation", "search"}
        separate_keys |= {key for key in ("tokenizer", "tokens") if not getattr(self, key)}
        sections = self.model_dump(mode="json", by_alias=True, exclude=separate_keys)
        absent_keys = [key for key in ("pad_rows_to", "rank") if getattr(self.output, key) is None]
        for key in (*absent_keys, *(["form"] if self.output.form == "model" else [])):
            del sections["output"][key]
        models = {key: sections.pop(key) for key in ("base", "experts")}
        return {**models, **_spelled_choice(self), "rules": [_spelled_rule(rule) for rule in self.rules], **sections}

    def as_model(self) -> Recipe:
        """The same merge with a model as its output, for what looks at the merge and not at its files."""
        output = self.output.model_copy(update={"form": "model", "rank": None})
        return self.model_copy(update={"output": output})

    def choices(self) -> Iterator[Choice]:
        """Yields the recipe's own choice, then the choice of each rule."""
        yield self
        yield from self.rules


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """Returns a recipe unchanged, or reads the file that a path names."""
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def _spelled_rule(rule: Rule) -> dict[str, Any]:
    entry = rule.model_dump(mode="json", include={"tensors", "kinds", "use"}, exclude_none=True)
    return entry if rule.use else {**entry, **_spelled_choice(rule)}


def _spelled_choice(choice: Choice) -> dict[str, Any]:
    if choice.pipeline is not None:
        return {"pipeline": [written(stage) for stage in choice.stages]}
    ((name, parameters),) = written(choice.stages[0]).items()
    return {"method": name, "parameters": parameters}


# --- building: every fault at once ----------------------------------------------------------------

_UNDECIDED = (
    "is left open for `merger search`, which writes a recipe with the best value; or give one with overrides=VALUES"
)


def search_of(document: Document) -> Search:
    """Parses the section ``search`` alone, of a recipe that still holds search marks."""
    try:
        return Search.model_validate(document.value.get("search") or {})
    except ValidationError as error:
        faults = translate_errors(error, lambda path: Search.model_fields, document.value["search"])
        raise RecipeError([document.fault(("search", *path), message) for path, message in faults]) from None


def overridden(document: Document, overrides: Iterable[str]) -> Document:
    """Spells a document out and applies the changes of `--set`; raises RecipeError for an invalid argument."""
    document = spell_out(document)
    for override in overrides:
        key, equals, value = override.partition("=")
        try:
            path = key_path(key.strip())
        except ValueError:
            path = ()
        if not equals or not path:
            raise RecipeError(f"overrides='{override}': expected key.path=value, with a key that holds a dot in quotes")
        try:
            document = document.changed(path, value_of(value, f"overrides='{key}'"))
        except KeyError as missing:
            raise RecipeError(f"overrides='{override}': there is no {missing.args[0]} in the list") from None
    return spell_out(document)


def _build(document: Document, overrides: Sequence[str]) -> Recipe:
    document = spell_out(document)
    if open_values := list(marks(document.value)):
        raise RecipeError([document.fault(path, _UNDECIDED) for path, _ in open_values])
    faults: list[tuple[KeyPath, str]] = []
    recipe = None
    try:
        recipe = Recipe(**document.value)
    except ValidationError as error:
        faults += translate_errors(error, _valid_fields, document.value)
    except TypeError:
        faults += [((str(key),), "is no text; quote it") for key in document.value if not isinstance(key, str)]
    raw = document.value
    experts = raw["experts"] if isinstance(raw.get("experts"), dict) else {}
    weights = {str(name): recipe.experts[name].weight if recipe else Fraction(1) for name in experts}
    rules = raw["rules"] if isinstance(raw.get("rules"), list) else []
    places: list[tuple[KeyPath, Any]] = [((), raw), *((("rules", i), rule) for i, rule in enumerate(rules))]
    stage_lists = [stages_of(node, path, weights, faults) for path, node in places if isinstance(node, Mapping)]
    if recipe is not None:
        for choice, stages in zip(recipe.choices(), stage_lists, strict=True):
            choice._stages = tuple(stages)
        faults += _conflicts(recipe)
        recipe._document, recipe._overrides = document, tuple(overrides)
    if faults or recipe is None:
        ordered_faults = sorted(dict.fromkeys(faults), key=lambda fault: document.line(fault[0]))
        raise RecipeError([document.fault(path, message) for path, message in ordered_faults])
    return recipe


def _conflicts(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    """Returns the faults between the sections of a well-formed recipe."""
    stages = [_bounds(recipe, choice) for choice in recipe.choices()]
    return [*vocabulary_faults(recipe), *output_faults(recipe, stages), *_calibration_faults(recipe)]


def _calibration_faults(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    faults: list[tuple[KeyPath, str]] = []
    experts, calibration = tuple(recipe.experts), recipe.calibration
    if calibration is not None:
        by_expert = {"data": calibration.data, "stats": calibration.stats, "samples": calibration.samples}
        for key, value in by_expert.items():
            for name in value if isinstance(value, dict) else ():
                if name not in experts:
                    faults.append((("calibration", key, name), f"there is no such expert; {nearest(name, experts)}"))
    if not is_calibrated(recipe):
        return faults
    if calibration is None:
        return [_without_text(recipe), *faults]
    streams = sorted({source.stream for source in _inputs(recipe) if source.granularity == "block"}, reverse=True)
    if len(streams) > 1:
        reason = "all text goes one way through the model"
        faults.append(((), f"inputs: {streams[0]} in one method and {streams[1]} in another; {reason}"))
    with_data = (
        set(calibration.data) if isinstance(calibration.data, dict) else set(experts if calibration.data else ())
    )
    from_text = follows_merge(recipe)
    experts_without_text = [
        name for name in experts if name not in (with_data if from_text else with_data | set(calibration.stats))
    ]
    if experts_without_text:
        reason = "no data, as inputs behind merged blocks need it," if from_text else "no data and no stats"
        faults.append((("calibration",), f"{reason} for {', '.join(experts_without_text)}"))
    return faults


def _without_text(recipe: Recipe) -> tuple[KeyPath, str]:
    """Returns the fault of the first choice that needs text, for a recipe without text."""
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


def follows_merge(recipe: Recipe) -> bool:
    """Whether stages look at blocks behind the merged ones, so that nothing can be said before these are merged."""
    return any(source.follows_merge for source in _inputs(recipe))


def is_calibrated(recipe: Recipe) -> bool:
    """Whether a stage needs an input that is made from calibration text."""
    return any(source.needs_text for source in _inputs(recipe))


def _inputs(recipe: Recipe, *choices: Choice) -> set[StageInput]:
    """Returns the inputs besides weights that the stages of ``choices`` need, by default of all choices."""
    return {source for bound in _bounds(recipe, *choices) for source in bound.inputs}


def _bounds(recipe: Recipe, *choices: Choice) -> list[Bound]:
    """Binds the stages of ``choices``, by default of all choices, for a matrix."""
    place = Place(tuple(recipe.experts))
    try:
        return [
            bind(expanded, place)
            for choice in choices or recipe.choices()
            for stage in choice.stages
            for expanded in expand(stage, "linear", place.experts)
        ]
    except ValueError:  # is a fault already
        return []


_SECTIONS: dict[str | int, Any] = {
    "base": Source,
    "experts": Expert,
    "output": Output,
    "calibration": Calibration,
    "evaluation": Evaluation,
    "search": Search,
    "rules": Rule,
    "tokens": TokenRow,
}


def _valid_fields(path: KeyPath) -> set[str]:
    """Returns the valid keys at ``path`` of the recipe."""
    is_text = len(path) > 2 and path[1] == "data" and path[0] in ("calibration", "evaluation")
    section = TextSource if is_text else _SECTIONS.get(path[0], Recipe) if path else Recipe
    return {field.alias or name for name, field in section.model_fields.items()}


# --- for editors ----------------------------------------------------------------------------------


def portable_location(source: str) -> str:
    """Returns a model's name without folders of this machine: the last part of an absolute path."""
    return Path(source).name if Path(source).expanduser().is_absolute() else source
