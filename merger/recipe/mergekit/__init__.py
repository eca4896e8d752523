"""Imports a mergekit configuration as a recipe of the same merge, or names the keys that have no equivalent.

The import reads nothing but the configuration. Where the meaning of a key differs, mergekit's counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from merger.errors import RecipeError, nearest
from merger.recipe.document import Document, KeyPath
from merger.recipe.foreign import is_mixture, mixture_fault, recipe_fault
from merger.recipe.mergekit.choices import absence_parameter, recipe_choices
from merger.recipe.mergekit.references import Faults, Reference, expert_names, reference
from merger.recipe.mergekit.settings import Settings, Slice, Source
from merger.recipe.mergekit.slices import SliceEntries, layer_count, stay_in_place
from merger.recipe.mergekit.table import METHODS, Method
from merger.recipe.mergekit.vocabulary import Vocabulary
from merger.recipe.places import place_name
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

    def written(self, source: str) -> str:
        """Returns the recipe as YAML below its notes; ``source`` names the configuration."""
        notes = "".join(f"# {note}\n" for note in (f"From {source}, by merger import.", *self.notes))
        return notes + yaml.safe_dump(self.recipe, sort_keys=False, default_flow_style=None, width=120)


def _unknown(model: str) -> None:
    """The number of layers of a model that is not at hand."""


def import_mergekit(
    document: Document,
    place: Callable[[str], str] = str,
    count_layers: Callable[[str], int | None] = _unknown,
) -> Imported:
    """Imports a mergekit configuration; raises RecipeError with all keys that have no equivalent and their lines.

    ``place`` returns a model's path relative to the recipe, ``count_layers`` the number of layers of the model there,
    or None where it is not at hand.
    """
    keys = document.lines.keys()
    if fault := mixture_fault(document.label) if is_mixture(keys) else recipe_fault(document.label, keys):
        raise RecipeError(fault)
    return _Importer(document, place, count_layers).import_recipe()


class _Importer:
    """Collects the faults of a whole configuration before it raises."""

    def __init__(
        self, document: Document, place: Callable[[str], str], count_layers: Callable[[str], int | None]
    ) -> None:
        self.document = document
        self.config = document.value
        self.place, self.count_layers = place, count_layers
        self.faults: Faults = []
        self.notes: list[str] = []
        self.misspelt: Faults = []  # keys that mergekit ignores, near one that it reads: told with faults, or as notes

    def import_recipe(self) -> Imported:
        method = self._method()
        base = self._base()
        slices = self._slices()
        self._note_other_keys()
        start, experts = self._roles(method or METHODS["linear"], base, slices)
        space = "weights" if start in experts else "delta"
        moves = method is not None and self._moves_layers(method, start, slices)
        if moves and method is METHODS["passthrough"]:  # copies need no second name for the base
            experts = [model for model in experts if model != start]
        names = expert_names(experts)
        vocabulary = Vocabulary(self.config, {**names, start: "base"}, self.faults, self.notes)
        for path, entries, valid_keys in vocabulary.sections():
            self._note_ignored_keys(entries, valid_keys, path)
        settings = self._settings(method, slices)
        choices: dict[str, Any] = {}
        if method is not None and moves:
            choices = SliceEntries(method, settings, names, start, space).recipe_keys()
        elif method is not None and names:
            choices = recipe_choices(method, settings, names, space)
        recipe = {
            "base": self._relocate(start),
            **({"experts": {name: self._relocate(model) for model, name in names.items()}} if names else {}),
            **choices,
            **vocabulary.recipe_keys(),
            "output": {"path": _PATH, **self._dtype(), **vocabulary.output_keys()},
        }
        self._raise_faults()
        document = Document("recipe", Path(), recipe)
        faults = [document.fault(path, message).removeprefix("recipe: ") for path, message in recipe_faults(document)]
        self.faults += [(("merge_method",), fault) for fault in faults]
        self._raise_faults()
        layers = layer_count(slices)
        if layers is not None and not moves and self._layer_counts([start, *experts]) != {layers}:
            self.notes.append(f"slices: the models must have just {layers} layers: merger merges all that there are.")
        return Imported(recipe, tuple(dict.fromkeys(self.notes)))

    def _moves_layers(self, method: Method, start: Reference, slices: list[Slice]) -> bool:
        """Whether the layers of the output are not those of all models, one by one."""
        layers = layer_count(slices)
        if layers is None:
            return False
        models = [{source.model for source in part.sources} for part in slices]
        are_alike = absence_parameter(method) is not None or all(others == models[0] for others in models)
        is_complete = self.count_layers(self.place(start.model)) in (None, layers)
        return not (are_alike and is_complete and stay_in_place(slices))

    def _layer_counts(self, models: list[Reference]) -> set[int | None]:
        return {self.count_layers(self.place(model.model)) for model in models}

    def _raise_faults(self) -> None:
        if self.faults:
            faults = sorted(
                dict.fromkeys([*self.faults, *self.misspelt]), key=lambda fault: self.document.line(fault[0])
            )
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
        slices = []
        for i, entry in enumerate(self._list_entries(holder["slices"], (*path, "slices"))):
            slice_path: KeyPath = (*path, "slices", i)
            self._same_base(entry.get("base_model"), (*slice_path, "base_model"))
            self._note_ignored_keys(entry, {"sources", "base_model", "parameters"}, slice_path)
            sources = tuple(self._sources(entry.get("sources"), (*slice_path, "sources"), {"layer_range"}))
            slices.append(Slice(slice_path, sources, entry.get("parameters"), self._layers(sources)))
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

    def _layers(self, sources: tuple[Source, ...]) -> int:
        """Returns the number of layers of a slice; sources with other numbers of them are a fault."""
        counts: list[int] = []
        for source in sources:
            place = (*source.path, "layer_range")
            match source.layers:
                case [int(first), int(stop)] if 0 <= first < stop:
                    counts.append(stop - first)
                    if counts[-1] != counts[0]:
                        self.faults.append((place, f"has {counts[-1]} layers, but {counts[0]} in the same slice"))
                case _:
                    self.faults.append((place, "expected the first layer and the one after the last, as in [0, 32]"))
        return counts[0] if counts else 1

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

    def _settings(self, method: Method | None, slices: list[Slice]) -> Settings:
        """The parameters of the file; notes those that mergekit does not look at, in any method if there is none."""
        holder_path, holder = self._holder()
        general = {
            (*holder_path, "parameters"): holder.get("parameters"),
            ("parameters",): self.config.get("parameters"),
        }
        settings = Settings(slices, list(general.items()), self.faults)
        methods = METHODS.values() if method is None else [method]
        valid_keys = {name for entry in methods for name in (*entry.parameters, *entry.idle)}
        for path, parameters in settings.parameter_maps():
            self._note_ignored_keys(parameters, valid_keys, path)
        return settings

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
            if key in valid_keys:
                continue
            suggestion = nearest(str(key), valid_keys)
            message = "mergekit does not look at it"
            if suggestion.startswith("did"):
                message = f"{message}; {suggestion}"
                self.misspelt.append(((*path, key), message))
            end = "" if message.endswith("?") else "."
            self.notes.append(f"{place_name((*path, key), self.config)}: {message}{end}")
