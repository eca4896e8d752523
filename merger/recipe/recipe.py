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
from merger.errors import RecipeError
from merger.options import path_argument
from merger.pipeline.registry import ENTRIES, SCORES, parameter_names, written
from merger.recipe.calibration_faults import calibration_faults, is_calibrated
from merger.recipe.document import Document, KeyPath, key_path, parse, read, value_of
from merger.recipe.expert_references import reference_faults
from merger.recipe.faults import translate_errors
from merger.recipe.layer_faults import layer_faults, weights_of
from merger.recipe.layers import Layer
from merger.recipe.named_inputs import missing_inputs, place_faults
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
from merger.recipe.stages import stages_of, written_choices
from merger.recipe.trajectory import Trajectory, trajectory_faults
from merger.recipe.vocabulary_faults import vocabulary_faults

_Expert = Annotated[Expert, BeforeValidator(source_of, json_schema_input_type=str | Expert)]
_ExpertsByName = dict[str, _Expert]
_ExpertList = Annotated[list[_Expert], Field(min_length=1)]


class Recipe(Choice):
    """A merge: inputs, method, rules, output."""

    base: Annotated[Source, BeforeValidator(source_of, json_schema_input_type=str | Source)] = Field(
        description="The model that the experts were tuned from."
    )
    experts: Annotated[
        dict[Annotated[str, AfterValidator(expert_name)], _Expert],
        BeforeValidator(experts_by_name, json_schema_input_type=_ExpertsByName | _ExpertList | Trajectory),
    ] = Field(
        default_factory=dict,
        description="Its fine-tunes by name, in merging order; or a list, where folders give the names; or the "
        "checkpoints of one run as {glob: PATTERN, weights: SCHEME}, which need no base. May be left out where "
        "`layers` copy the base alone.",
    )
    layers: list[Layer] = Field(
        default_factory=list,
        description="The blocks of the output, where they are not those of the base one by one: ranges of the models' "
        "blocks, copied or merged, in order.",
    )
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
        stages = [name for stage in self.stages for name in written(stage)] or ["layers"]
        experts = name_list(list(self.experts) or ["base"])
        return f"Recipe({' + '.join(stages)} of {experts}; base {self.base.model}, output {self.output.path})"

    __str__ = __repr__

    @property
    def folder(self) -> Path:
        """The recipe's folder, where relative paths start."""
        return self._document.folder

    def fault(self, path: KeyPath, message: str) -> str:
        """``file:line: place: message``, for a key of the recipe as it was written."""
        return self._document.fault(path, message)

    def missing_inputs(self, *, with_evaluation: bool = False) -> list[str]:
        """Returns a fault for each input that its stages take and that is neither here nor on the Hub.

        Held-out examples count ``with_evaluation``.
        """
        faults = missing_inputs(self._document, with_texts=is_calibrated(self), with_evaluation=with_evaluation)
        return [self.fault(path, message) for path, message in faults]

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
        """Reads and checks a recipe; raises RecipeError with all faults at once, each with its line and key.

        With the faults of a recipe come its inputs that are not there. A recipe without faults may be made before its
        inputs are; whatever opens them checks that they are there.
        """
        file = path_argument("path", path)
        if isinstance(overrides, str | Mapping):
            expected = "expected a list of texts, as in ['parameters.density=0.3']"
            raise RecipeError(f"overrides: {expected}, not {type(overrides).__name__}")
        return cls.of(overridden(read(file), overrides), overrides)

    @classmethod
    def of(cls, document: Document, overrides: Sequence[str] = ()) -> Recipe:
        """Builds the recipe of a document to which ``overrides`` have been applied; raises as `load` does."""
        document = spell_out(document)
        recipe, faults = _parse(document)
        if recipe is None or faults:
            faults += missing_inputs(document, with_texts=_may_take_text(recipe))
            faults += place_faults(document)
            raise RecipeError([document.fault(path, message) for path, message in _in_order(document, faults)])
        recipe._document, recipe._overrides = document, tuple(overrides)
        return recipe

    @classmethod
    def parse(cls, text: str | Mapping[str, Any], folder: str | Path = ".") -> Recipe:
        """Builds a recipe from YAML text or from a dictionary; relative paths start at ``folder``."""
        if isinstance(text, str):
            return cls.of(parse(text, "recipe", Path(folder).resolve()))
        if not isinstance(text, Mapping):
            expected = "expected YAML text, or a dictionary with base, experts, method and output"
            raise RecipeError(f"recipe: {expected}, not {type(text).__name__}")
        return cls.of(Document("recipe", Path(folder).resolve(), dict(text)))

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
        separate_keys = {"method", "parameters", "pipeline", "rules", "layers", "evaluation", "search"}
        separate_keys |= {key for key in ("tokenizer", "tokens") if not getattr(self, key)}
        sections = self.model_dump(mode="json", by_alias=True, exclude=separate_keys)
        absent_keys = [key for key in ("pad_rows_to", "rank") if getattr(self.output, key) is None]
        for key in (*absent_keys, *(["form"] if self.output.form == "model" else [])):
            del sections["output"][key]
        models = {key: sections.pop(key) for key in ("base", "experts")}
        for source in (models["base"], *models["experts"].values()):
            if not source["rename"]:
                del source["rename"]
        layers = {"layers": [_spelled_layer(layer) for layer in self.layers]} if self.layers else {}
        rules = [_spelled_rule(rule) for rule in self.rules]
        return {**models, **_spelled_choice(self), **layers, "rules": rules, **sections}

    def as_model(self) -> Recipe:
        """The same merge with a model as its output, for what looks at the merge and not at its files."""
        output = self.output.model_copy(update={"form": "model", "rank": None})
        return self.model_copy(update={"output": output})

    def choices(self) -> dict[KeyPath, Choice]:
        """Returns the recipe's own choice, then those of its rules and of `layers`, by key; in the order of groups."""
        choices: dict[KeyPath, Choice] = {(): self}
        choices.update({("rules", i): rule for i, rule in enumerate(self.rules)})
        choices.update({("layers", i): layer for i, layer in enumerate(self.layers)})
        return choices

    def experts_of(self, choice: Choice) -> tuple[str, ...]:
        """Returns the experts that a choice merges: all of them, but for an entry of `layers` that names some."""
        ranges = choice.ranges(self.experts) if isinstance(choice, Layer) else self.experts
        return tuple(name for name in self.experts if name in ranges)

    @property
    def has_method(self) -> bool:
        """Whether the recipe has a method, which only one with `layers` may do without."""
        return self.method is not None or self.pipeline is not None


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """Returns a recipe unchanged, or reads the file that a path names; RecipeError for anything else."""
    return recipe if isinstance(recipe, Recipe) else Recipe.load(path_argument("recipe", recipe))


def _spelled_rule(rule: Rule) -> dict[str, Any]:
    entry = rule.model_dump(mode="json", include={"tensors", "kinds", "use"}, exclude_none=True)
    return entry if rule.use else {**entry, **_spelled_choice(rule)}


def _spelled_layer(layer: Layer) -> dict[str, Any]:
    entry = layer.model_dump(mode="json", include={"model", "range", "scale"}, exclude_none=True)
    return {**entry, **_spelled_choice(layer)}


def choice_name(path: KeyPath) -> str:
    """Names a choice by its key, as the manifest does: recipe, rule 2 or layers 1."""
    return "recipe" if not path else f"{'rule' if path[0] == 'rules' else path[0]} {int(path[1]) + 1}"


def _spelled_choice(choice: Choice) -> dict[str, Any]:
    if not choice.stages:
        return {}
    if choice.pipeline is not None:
        return {"pipeline": [written(stage) for stage in choice.stages]}
    ((name, parameters),) = written(choice.stages[0]).items()
    return {"method": name, "parameters": parameters}


# --- building: every fault at once ----------------------------------------------------------------


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
            reason = f"there is no {missing.args[0]} in the list, which is counted from 0"
            raise RecipeError(f"overrides='{override}': {reason}") from None
    return spell_out(document)


def recipe_faults(document: Document) -> list[tuple[KeyPath, str]]:
    """Returns the faults of a document by key, in its order; whether its inputs are there is none of them."""
    _, faults = _parse(spell_out(document))
    return _in_order(document, faults)


def _parse(document: Document) -> tuple[Recipe | None, list[tuple[KeyPath, str]]]:
    """Returns the recipe of a document, as far as there is one, and the document's faults."""
    if open_values := [(path, _undecided(path)) for path, _ in marks(document.value)]:
        return None, open_values
    if unmatched := trajectory_faults(document):
        return None, unmatched
    raw = document.value
    faults: list[tuple[KeyPath, str]] = []
    if not raw.get("layers") and raw.get("experts", {}) == {}:
        faults.append((("experts",), "is {}, expected at least 1 of them" if "experts" in raw else "is missing"))
    recipe = None
    try:
        recipe = Recipe(**document.value)
    except ValidationError as error:
        faults += translate_errors(error, _valid_fields, document.value, _nested_keys(raw))
    except TypeError:
        faults += [((str(key),), "is no text; quote it") for key in document.value if not isinstance(key, str)]
    experts = raw["experts"] if isinstance(raw.get("experts"), dict) else {}
    weights = {str(name): recipe.experts[name].weight if recipe else Fraction(1) for name in experts}
    stages = {
        path: stages_of(node, path, weights_of(node, weights), faults)
        for path, node in written_choices(raw)
        if isinstance(node, Mapping)
    }
    faults += reference_faults(raw)
    if recipe is not None:
        for path, choice in recipe.choices().items():
            choice._stages = tuple(stages.get(path, ()))
        faults += _conflicts(recipe) if recipe.experts or recipe.layers else []
    return recipe, faults


def _conflicts(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    """Returns the faults between the sections of a well-formed recipe."""
    return [*layer_faults(recipe), *vocabulary_faults(recipe), *output_faults(recipe), *calibration_faults(recipe)]


def _in_order(document: Document, faults: Iterable[tuple[KeyPath, str]]) -> list[tuple[KeyPath, str]]:
    """Returns the faults in the order of their lines, each once."""
    return sorted(dict.fromkeys(faults), key=lambda fault: document.line(fault[0]))


def _undecided(path: KeyPath) -> str:
    """Returns the fault of a value that is left open where a definite one is needed."""
    key = ".".join(map(str, path))
    return (
        f"is left open for `merger search`, which writes a recipe with the best value; or give overrides='{key}=VALUE'"
    )


def _may_take_text(recipe: Recipe | None) -> bool:
    """Whether some stage takes text, or cannot be told because of a fault."""
    if recipe is None or is_calibrated(recipe):
        return True
    return any(not choice.stages for choice in recipe.choices().values() if choice.method or choice.pipeline)


_SECTIONS: dict[str | int, Any] = {
    "base": Source,
    "experts": Expert,
    "output": Output,
    "calibration": Calibration,
    "evaluation": Evaluation,
    "search": Search,
    "rules": Rule,
    "layers": Layer,
    "tokens": TokenRow,
}


def _valid_fields(path: KeyPath) -> set[str]:
    """Returns the valid keys at ``path`` of the recipe."""
    is_text = len(path) > 2 and path[1] == "data" and path[0] in ("calibration", "evaluation")
    section = TextSource if is_text else _SECTIONS.get(path[0], Recipe) if path else Recipe
    return {field.alias or name for name, field in section.model_fields.items()}


def _nested_keys(raw: Mapping[str, Any]) -> list[KeyPath]:
    """Returns the keys of the method's parameters and of the sections that are one each."""
    name = raw.get("method")
    is_method = isinstance(name, str) and (name in ENTRIES or name in SCORES)
    keys: list[KeyPath] = [("parameters", key) for key in sorted(parameter_names(str(name)) if is_method else ())]
    for section in ("output", "calibration", "evaluation", "search"):
        keys += [(section, key) for key in sorted(_valid_fields((section,)))]
    return keys


# --- for editors ----------------------------------------------------------------------------------


def portable_location(source: str) -> str:
    """Returns a model's name without folders of this machine: the last part of an absolute path."""
    return Path(source).name if Path(source).expanduser().is_absolute() else source
