"""Imports a mergekit configuration as a recipe of the same merge, or names the keys that have no equivalent.

The import reads nothing but the configuration. Where the meaning of a key differs, mergekit's counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import yaml

from merger.checkpoint.tensor_kinds import text_config
from merger.errors import RecipeError, nearest
from merger.recipe.document import Document, KeyPath
from merger.recipe.foreign import is_mixture, mixture_fault, recipe_fault
from merger.recipe.mergekit.references import Faults, Reference, expert_names, reference
from merger.recipe.mergekit.settings import (
    CONV1D,
    MOST_FILTERS,
    Group,
    Settings,
    Slice,
    Source,
    choose_rules,
    rule_condition,
)
from merger.recipe.mergekit.table import METHODS, Method
from merger.recipe.mergekit.vocabulary import Vocabulary
from merger.recipe.recipe import recipe_faults
from merger.recipe.sections import DType

_KEYS = {
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "modules",
}  # fmt: skip
_TEMPLATE = "has no equivalent: the tokenizer keeps its own; leave it out, and put another beside the output"
_PATH = "out/merged"


@dataclass(frozen=True)
class Imported:
    """The recipe of a mergekit configuration."""

    recipe: dict[str, Any]
    notes: tuple[str, ...]  # differences, and keys that neither tool reads
    layers: int | None  # the number of layers in the slices

    def written(self, source: str) -> str:
        """Returns the recipe as YAML below its notes; ``source`` names the configuration."""
        notes = "".join(f"# {note}\n" for note in (f"From {source}, by merger import.", *self.notes))
        return notes + yaml.safe_dump(self.recipe, sort_keys=False, default_flow_style=None, width=120)


def import_mergekit(document: Document, place: Callable[[str], str] = str) -> Imported:
    """Imports a mergekit configuration; raises RecipeError with all keys that have no equivalent and their lines.

    ``place`` returns a model's path relative to the recipe.
    """
    keys = document.lines.keys()
    if fault := mixture_fault(document.label) if is_mixture(keys) else recipe_fault(document.label, keys):
        raise RecipeError(fault)
    return _Importer(document, place).import_recipe()


def layers_of(config: Any) -> int | None:
    """Returns the number of layers in a model's config.json."""
    inner = text_config(config) if isinstance(config, Mapping) else {}
    return next(
        (inner[key] for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if key in inner), None
    )


class _Importer:
    """Collects the faults of a whole configuration before it raises."""

    def __init__(self, document: Document, place: Callable[[str], str]) -> None:
        self.document = document
        self.config = document.value
        self.place = place
        self.faults: Faults = []
        self.notes: list[str] = []

    def import_recipe(self) -> Imported:
        method = self._method()
        base = self._base()
        slices = self._slices()
        self._note_other_keys()
        start, experts = self._roles(method or METHODS["linear"], base, slices)
        names = expert_names(experts)
        vocabulary = Vocabulary(self.config, {**names, start: "base"}, self.faults, self.notes)
        recipe = {
            "base": self._relocate(start),
            "experts": {name: self._relocate(model) for model, name in names.items()},
            **(self._choices(method, slices, names, delta=start not in experts) if method and names else {}),
            **vocabulary.recipe_keys(),
            "output": {"path": _PATH, **self._dtype(), **vocabulary.output_keys()},
        }
        self._raise_faults()
        document = Document("recipe", Path(), recipe)
        faults = [document.fault(path, message).removeprefix("recipe: ") for path, message in recipe_faults(document)]
        self.faults += [(("merge_method",), fault) for fault in faults]
        self._raise_faults()
        counts = [part.layers for part in slices if part.layers is not None]
        layers = sum(counts) if counts else None
        if layers is not None:
            self.notes.append(f"slices: the models must have just {layers} layers: merger merges all that there are.")
        return Imported(recipe, tuple(dict.fromkeys(self.notes)), layers)

    def _raise_faults(self) -> None:
        if self.faults:
            faults = sorted(dict.fromkeys(self.faults), key=lambda fault: self.document.line(fault[0]))
            raise RecipeError([self.document.fault(path, message) for path, message in faults])

    # --- models ---

    def _relocate(self, model: Reference) -> Any:
        adapter = None if model.adapter is None else self.place(model.adapter)
        return Reference(self.place(model.model), adapter).written

    def _method(self) -> Method | None:
        name = self.config.get("merge_method")
        if not isinstance(name, str) or name not in METHODS:
            suggestion = nearest(str(name), METHODS)
            self.faults.append(
                (("merge_method",), "is missing" if name is None else f"{name!r} has no equivalent; {suggestion}")
            )
            return None
        if METHODS[name].remark:
            self.notes.append(f"{name} {METHODS[name].remark}.")
        return METHODS[name]

    def _base(self) -> Reference | None:
        value = self.config.get("base_model")
        return None if value is None else reference(value, ("base_model",), self.faults)

    def _holder(self) -> tuple[KeyPath, Mapping[str, Any]]:
        """Returns the path and the map that holds models or slices: the file, or its only module."""
        modules = self.config.get("modules")
        if modules is None:
            return (), self.config
        if (
            isinstance(modules, Mapping)
            and len(modules) == 1
            and isinstance(inner := next(iter(modules.values())), Mapping)
        ):
            path: KeyPath = ("modules", str(next(iter(modules))))
            self._note_ignored_keys(inner, {"models", "slices", "parameters"}, path)
            return path, inner
        self.faults.append((("modules",), "has no equivalent with several modules: rules tell tensors apart, by name"))
        return (), {}

    def _slices(self) -> list[Slice]:
        path, holder = self._holder()
        keys = [key for key in ("models", "slices") if holder.get(key)]
        if len(keys) != 1:
            self.faults.append((path, f"expected models or slices, found {' and '.join(keys) or 'neither'}"))
            return []
        if keys == ["models"]:
            return [Slice((*path, "models"), tuple(self._sources(holder["models"], (*path, "models"))))]
        slices, layers = [], 0
        for i, entry in enumerate(self._list_entries(holder["slices"], (*path, "slices"))):
            slice_path: KeyPath = (*path, "slices", i)
            self._same_base(entry.get("base_model"), (*slice_path, "base_model"))
            self._note_ignored_keys(entry, {"sources", "base_model", "parameters"}, slice_path)
            sources = tuple(self._sources(entry.get("sources"), (*slice_path, "sources"), {"layer_range"}))
            count = self._layers(sources, layers)
            slices.append(Slice(slice_path, sources, entry.get("parameters"), count))
            layers += count
        return slices

    def _sources(self, entries: Any, path: KeyPath, extra_keys: set[str] = set()) -> Iterator[Source]:  # noqa: B006
        models: set[Reference] = set()
        for i, entry in enumerate(self._list_entries(entries, path)):
            model = reference(entry.get("model"), (*path, i, "model"), self.faults)
            self._note_ignored_keys(entry, {"model", "parameters"} | extra_keys, (*path, i))
            if model in models:
                self.faults.append(((*path, i, "model"), "stands here a second time"))
            elif model is not None:
                models.add(model)
                yield Source(model, (*path, i), entry.get("parameters"), entry.get("layer_range"))

    def _list_entries(self, entries: Any, path: KeyPath) -> list[Mapping[str, Any]]:
        if isinstance(entries, list) and entries and all(isinstance(entry, Mapping) for entry in entries):
            return entries
        self.faults.append((path, "expected a list of keys and values"))
        return []

    def _layers(self, sources: tuple[Source, ...], begin: int) -> int:
        """Returns the number of layers of a slice; a slice that does not begin at ``begin`` is a fault."""
        end = begin + 1
        for i, source in enumerate(sources):
            place = (*source.path, "layer_range")
            match source.layers:
                case [int(first), int(stop)] if first == begin < stop and (i == 0 or stop == end):
                    end = stop
                case [int(first), int(stop)] if i and stop - first != end - begin:
                    self.faults.append((place, f"has {stop - first} layers, but {end - begin} in the same slice"))
                case [int(first), int(stop)]:
                    moved = f"layers {first} to {stop - 1} would not stay where they are"
                    self.faults.append((place, f"has no equivalent: {moved} (expected a range from {begin} on)"))
                case _:
                    self.faults.append((place, "expected the first layer and the one after the last, as in [0, 32]"))
        return end - begin

    def _same_base(self, value: Any, path: KeyPath) -> None:
        if value is not None and reference(value, path, self.faults) != self._base():
            self.faults.append((path, "has no equivalent: one merge has one base"))

    def _roles(self, method: Method, base: Reference | None, slices: list[Slice]) -> tuple[Reference, list[Reference]]:
        """Returns the base and the experts of the recipe, in order."""
        models = list(dict.fromkeys(source.model for part in slices for source in part.sources))
        if not models:  # which is told already
            return Reference("nothing"), []
        if base is None and method.base in ("first", "origin"):
            self.faults.append((("merge_method",), "needs a base_model"))
        experts = [model for model in models if model != base]
        if method.base == "origin" or (method.base == "either" and base is not None):
            if not experts:
                self.faults.append((("models",), "expected a model other than base_model"))
            return base or models[0], experts
        if method.base == "first" and base is not None:
            return base, [base, *experts]
        if base is not None and base not in models and slices[0].layers is None:  # mergekit adds it to whole models
            models.append(base)
        return base or models[0], models

    # --- parameters ---

    def _choices(
        self, method: Method, slices: list[Slice], names: Mapping[Reference, str], *, delta: bool
    ) -> dict[str, Any]:
        holder_path, holder = self._holder()
        general = {
            (*holder_path, "parameters"): holder.get("parameters"),
            ("parameters",): self.config.get("parameters"),
        }
        settings = Settings(slices, list(general.items()), self.faults)
        used = {*method.merge_parameters, *method.model_parameters}
        for path, parameters in settings.parameter_maps():
            self._note_ignored_keys(parameters, {*used, *method.idle}, path)
        self._same_models(method, slices)
        conditions = settings.conditions(used)
        if len(conditions) > MOST_FILTERS + 2:
            self.faults.append((("parameters",), f"more than {MOST_FILTERS} filters have no equivalent"))
            return {}
        main, rules = choose_rules(
            conditions, partial(_choice, method, settings, names, "delta" if delta else "weights")
        )
        if not rules:
            return main
        return {**main, "rules": [{**rule_condition(group), **choice} for group, choice in rules]}

    def _same_models(self, method: Method, slices: list[Slice]) -> None:
        """Refuses slices of other models, unless the absent ones can be given a weight of 0."""
        models = [{source.model for source in part.sources} for part in slices]
        for part, slice_models in zip(slices, models, strict=True):
            if _absence_parameter(method) is None and slice_models != models[0]:
                self.faults.append(((*part.path, "sources"), "has no equivalent: other models than in the first slice"))

    # --- what is left ---

    def _dtype(self) -> dict[str, str]:
        """Returns the output dtype: mergekit writes ``out_dtype``, or else ``dtype``, in which it computes."""
        dtype = {}
        for key in ("dtype", "out_dtype"):
            value = self.config.get(key)
            if value is not None:
                dtype["dtype"] = str(value).removeprefix("torch.")
                if dtype["dtype"] not in get_args(DType):
                    self.faults.append(((key,), f"{value!r} has no equivalent; {nearest(str(value), get_args(DType))}"))
        return dtype

    def _note_other_keys(self) -> None:
        if self.config.get("chat_template") is not None:
            self.faults.append((("chat_template",), _TEMPLATE))
        self._note_ignored_keys(self.config, {*_KEYS, "chat_template"}, ())

    def _note_ignored_keys(self, entries: Mapping[str, Any], valid_keys: set[str], path: KeyPath) -> None:
        for key in entries:
            if key not in valid_keys:
                self.notes.append(f"{'.'.join(map(str, (*path, key)))}: mergekit does not look at it.")


def _absence_parameter(method: Method) -> str | None:
    """Returns the parameter whose value 0 excludes a model."""
    return next((name for name in ("weight", "scale") if name in method.model_parameters), None)


def _choice(
    method: Method, settings: Settings, names: Mapping[Reference, str], space: str, group: Group
) -> dict[str, Any]:
    """The method and its parameters, or the pipeline, for the tensors of a group."""
    values: dict[str, Any] = {"space": space, "stored_transposed": CONV1D in group}
    for name, default in method.merge_parameters.items():
        read = settings.switch if isinstance(default, bool) else settings.number
        values[name] = read(name, default, group)
    for name, default in method.model_parameters.items():
        missing = 0 if name == _absence_parameter(method) else None
        values[name] = {
            expert: settings.number(name, default, group, model, missing) for model, expert in names.items()
        }
    try:
        stages = [(name, parameters) for stage in method.stages(values) for name, parameters in stage.items()]
    except ValueError as error:
        settings.faults.append((("merge_method",), str(error)))
        return {}
    entries = [(name, {key: _collapse(value) for key, value in parameters.items()}) for name, parameters in stages]
    if len(entries) > 1:
        return {"pipeline": [{name: parameters} for name, parameters in entries]}
    ((name, parameters),) = entries
    return {"method": name, "parameters": parameters} if parameters else {"method": name}


def _collapse(value: Any) -> Any:
    """Replaces a map with equal values for all experts by that value."""
    if isinstance(value, dict) and all(entry == value[next(iter(value))] for entry in value.values()):
        return next(iter(value.values()))
    return value
