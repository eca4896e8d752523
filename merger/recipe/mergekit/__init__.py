"""A mergekit configuration as a recipe: the same merge in this tool's words, or which of its keys has none.

Text in, text out; nothing is read but the configuration. mergekit's own meaning is kept where it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import yaml

from merger.checkpoint.tensor_kinds import text_config
from merger.errors import RecipeError, nearest
from merger.recipe.document import Document, KeyPath
from merger.recipe.mergekit.references import Faults, Reference, expert_names, reference
from merger.recipe.mergekit.settings import (
    CONV1D,
    MOST_FILTERS,
    Group,
    Settings,
    Slice,
    Source,
    decided,
    matching,
)
from merger.recipe.mergekit.table import METHODS, Method
from merger.recipe.recipe import Recipe
from merger.recipe.sections import DType

_KEYS = {
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "modules",
}  # fmt: skip
_TEMPLATE = "has no equivalent: the tokenizer keeps its own; leave it out, and put another beside the output"
_UNION = "union has no equivalent: vocabularies are not put together; if all models share one, write base"
_PATH = "out/merged"


@dataclass(frozen=True)
class Imported:
    """A recipe that does what a mergekit configuration says."""

    recipe: dict[str, Any]
    notes: tuple[str, ...]  # what is not the same, or was looked at by neither tool
    layers: int | None  # how many the slices say that the model has

    def written(self, source: str) -> str:
        """The recipe as YAML, with the notes above it; ``source`` names the configuration."""
        notes = "".join(f"# {note}\n" for note in (f"From {source}, by merger import.", *self.notes))
        return notes + yaml.safe_dump(self.recipe, sort_keys=False, default_flow_style=None, width=120)


def import_mergekit(document: Document, place: Callable[[str], str] = str) -> Imported:
    """The recipe of a mergekit configuration; RecipeError with all that has no equivalent, each with its line.

    ``place`` says where a model's path lies as seen from the recipe.
    """
    return _Importer(document, place).imported()


def layers_of(config: Any) -> int | None:
    """How many layers a model's config.json says it has."""
    inner = text_config(config) if isinstance(config, Mapping) else {}
    return next(
        (inner[key] for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if key in inner), None
    )


class _Importer:
    """Gathers what has no equivalent over the whole file before it complains."""

    def __init__(self, document: Document, place: Callable[[str], str]) -> None:
        self.document = document
        self.config = document.value
        self.place = place
        self.faults: Faults = []
        self.notes: list[str] = []

    def imported(self) -> Imported:
        method = self._method()
        base = self._base()
        slices = self._slices()
        self._other_keys()
        start, experts = self._roles(method or METHODS["linear"], base, slices)
        names = expert_names(experts)
        recipe = {
            "base": self._placed(start),
            "experts": {name: self._placed(model) for model, name in names.items()},
            **(self._choices(method, slices, names, delta=start not in experts) if method and names else {}),
            "output": {"path": _PATH, **self._dtype(), **self._tokenizer(start, names)},
        }
        self._complain()
        try:
            Recipe.parse(recipe)
        except RecipeError as error:
            self.faults += [(("merge_method",), fault.removeprefix("recipe: ")) for fault in error.faults]
            self._complain()
        counts = [part.layers for part in slices if part.layers is not None]
        layers = sum(counts) if counts else None
        if layers is not None:
            self.notes.append(f"slices: the models must have just {layers} layers: merger merges all that there are.")
        return Imported(recipe, tuple(dict.fromkeys(self.notes)), layers)

    def _complain(self) -> None:
        if self.faults:
            placed = sorted(dict.fromkeys(self.faults), key=lambda fault: self.document.line(fault[0]))
            raise RecipeError([self.document.fault(path, message) for path, message in placed])

    # --- models ---

    def _placed(self, model: Reference) -> Any:
        adapter = None if model.adapter is None else self.place(model.adapter)
        return Reference(self.place(model.model), adapter).written

    def _method(self) -> Method | None:
        name = self.config.get("merge_method")
        if not isinstance(name, str) or name not in METHODS:
            near = nearest(str(name), METHODS)
            self.faults.append(
                (("merge_method",), "is missing" if name is None else f"{name!r} has no equivalent; {near}")
            )
            return None
        if METHODS[name].remark:
            self.notes.append(f"{name} {METHODS[name].remark}.")
        return METHODS[name]

    def _base(self) -> Reference | None:
        given = self.config.get("base_model")
        return None if given is None else reference(given, ("base_model",), self.faults)

    def _holder(self) -> tuple[KeyPath, Mapping[str, Any]]:
        """What holds models or slices: the file, or the only module that it names."""
        modules = self.config.get("modules")
        if modules is None:
            return (), self.config
        if (
            isinstance(modules, Mapping)
            and len(modules) == 1
            and isinstance(inner := next(iter(modules.values())), Mapping)
        ):
            path: KeyPath = ("modules", str(next(iter(modules))))
            self._ignored(inner, {"models", "slices", "parameters"}, path)
            return path, inner
        self.faults.append((("modules",), "has no equivalent with several modules: rules tell tensors apart, by name"))
        return (), {}

    def _slices(self) -> list[Slice]:
        above, holder = self._holder()
        given = [key for key in ("models", "slices") if holder.get(key)]
        if len(given) != 1:
            self.faults.append((above, f"expected models or slices, found {' and '.join(given) or 'neither'}"))
            return []
        if given == ["models"]:
            return [Slice((*above, "models"), tuple(self._sources(holder["models"], (*above, "models"))))]
        slices, layers = [], 0
        for i, each in enumerate(self._maps(holder["slices"], (*above, "slices"))):
            path: KeyPath = (*above, "slices", i)
            self._same_base(each.get("base_model"), (*path, "base_model"))
            self._ignored(each, {"sources", "base_model", "parameters"}, path)
            sources = tuple(self._sources(each.get("sources"), (*path, "sources"), {"layer_range"}))
            count = self._layers(sources, layers)
            slices.append(Slice(path, sources, each.get("parameters"), count))
            layers += count
        return slices

    def _sources(self, given: Any, path: KeyPath, known: set[str] = set()) -> Iterator[Source]:  # noqa: B006
        seen: set[Reference] = set()
        for i, each in enumerate(self._maps(given, path)):
            model = reference(each.get("model"), (*path, i, "model"), self.faults)
            self._ignored(each, {"model", "parameters"} | known, (*path, i))
            if model in seen:
                self.faults.append(((*path, i, "model"), "stands here a second time"))
            elif model is not None:
                seen.add(model)
                yield Source(model, (*path, i), each.get("parameters"), each.get("layer_range"))

    def _maps(self, given: Any, path: KeyPath) -> list[Mapping[str, Any]]:
        if isinstance(given, list) and given and all(isinstance(each, Mapping) for each in given):
            return given
        self.faults.append((path, "expected a list of keys and values"))
        return []

    def _layers(self, sources: tuple[Source, ...], begin: int) -> int:
        """How many layers a slice has, if they are those that come next."""
        end = begin + 1
        for i, source in enumerate(sources):
            here = (*source.path, "layer_range")
            match source.layers:
                case [int(first), int(stop)] if first == begin < stop and (i == 0 or stop == end):
                    end = stop
                case [int(first), int(stop)] if i and stop - first != end - begin:
                    self.faults.append((here, f"has {stop - first} layers, but {end - begin} in the same slice"))
                case [int(first), int(stop)]:
                    moved = f"layers {first} to {stop - 1} would not stay where they are"
                    self.faults.append((here, f"has no equivalent: {moved} (expected a range from {begin} on)"))
                case _:
                    self.faults.append((here, "expected the first layer and the one after the last, as in [0, 32]"))
        return end - begin

    def _same_base(self, given: Any, path: KeyPath) -> None:
        if given is not None and reference(given, path, self.faults) != self._base():
            self.faults.append((path, "has no equivalent: one merge has one base"))

    def _roles(self, method: Method, base: Reference | None, slices: list[Slice]) -> tuple[Reference, list[Reference]]:
        """The model that a recipe calls its base, and the experts, in order."""
        models = list(dict.fromkeys(source.model for part in slices for source in part.sources))
        if not models:  # which is told already
            return Reference("nothing"), []
        if base is None and method.base in ("first", "origin"):
            self.faults.append((("merge_method",), "needs a base_model"))
        others = [model for model in models if model != base]
        if method.base == "origin" or (method.base == "either" and base is not None):
            if not others:
                self.faults.append((("models",), "expected a model other than base_model"))
            return base or models[0], others
        if method.base == "first" and base is not None:
            return base, [base, *others]
        if base is not None and base not in models and slices[0].layers is None:  # mergekit adds it to whole models
            models.append(base)
        return base or models[0], models

    # --- parameters ---

    def _choices(
        self, method: Method, slices: list[Slice], names: Mapping[Reference, str], *, delta: bool
    ) -> dict[str, Any]:
        above, holder = self._holder()
        general = {(*above, "parameters"): holder.get("parameters"), ("parameters",): self.config.get("parameters")}
        settings = Settings(slices, list(general.items()), self.faults)
        used = {*method.shared, *method.each}
        for path, given in settings.everywhere():
            self._ignored(given, {*used, *method.idle}, path)
        self._same_models(method, slices)
        conditions = settings.conditions(used)
        if len(conditions) > MOST_FILTERS + 2:
            self.faults.append((("parameters",), f"more than {MOST_FILTERS} filters have no equivalent"))
            return {}
        main, rules = decided(conditions, partial(_choice, method, settings, names, "delta" if delta else "weights"))
        if not rules:
            return main
        return {**main, "rules": [{**matching(group), **choice} for group, choice in rules]}

    def _same_models(self, method: Method, slices: list[Slice]) -> None:
        """Refuses slices of other models, unless the absent ones can be given a weight of 0."""
        models = [{source.model for source in part.sources} for part in slices]
        for part, own in zip(slices, models, strict=True):
            if _absent(method) is None and own != models[0]:
                self.faults.append(((*part.path, "sources"), "has no equivalent: other models than in the first slice"))

    # --- what is left ---

    def _dtype(self) -> dict[str, str]:
        """mergekit computes in ``dtype`` and writes ``out_dtype``, or else what it computed in."""
        found = {}
        for key in ("dtype", "out_dtype"):
            given = self.config.get(key)
            if given is not None:
                found["dtype"] = str(given).removeprefix("torch.")
                if found["dtype"] not in get_args(DType):
                    self.faults.append(((key,), f"{given!r} has no equivalent; {nearest(str(given), get_args(DType))}"))
        return found

    def _tokenizer(self, base: Reference, names: Mapping[Reference, str]) -> dict[str, str]:
        path: KeyPath = ("tokenizer_source",)
        given, tokenizer = self.config.get("tokenizer_source"), self.config.get("tokenizer")
        if not isinstance(tokenizer, Mapping | None):
            self.faults.append((("tokenizer",), "expected keys and values, as in {source: base}"))
        elif given is None and tokenizer is not None:
            path = ("tokenizer", "source")
            given = tokenizer.get("source", "union")
            lacking = [key for key in ("tokens", "pad_to_multiple_of") if tokenizer.get(key)]
            self.faults += [(("tokenizer", key), "has no equivalent") for key in lacking]
        if given is None:
            return {}
        self.notes.append(
            "Vocabulary rows are matched by number, where mergekit matches the tokens that they stand for."
        )
        if given == "union":
            self.faults.append((path, _UNION))
            return {}
        model = base if given == "base" else reference(given, path, self.faults)
        if model is None or model == base:
            return {"tokenizer": "base"}
        if model not in names:
            self.faults.append((path, f"{given!r} is none of the models that are merged"))
        return {"tokenizer": names.get(model, "base")}

    def _other_keys(self) -> None:
        if self.config.get("chat_template") is not None:
            self.faults.append((("chat_template",), _TEMPLATE))
        self._ignored(self.config, {*_KEYS, "chat_template"}, ())

    def _ignored(self, given: Mapping[str, Any], known: set[str], path: KeyPath) -> None:
        for key in given:
            if key not in known:
                self.notes.append(f"{'.'.join(map(str, (*path, key)))}: mergekit does not look at it.")


def _absent(method: Method) -> str | None:
    """The parameter that says of a model, by a 0, that it takes no part."""
    return next((name for name in ("weight", "scale") if name in method.each), None)


def _choice(
    method: Method, settings: Settings, names: Mapping[Reference, str], space: str, group: Group
) -> dict[str, Any]:
    """The method and its parameters, or the pipeline, for the tensors of a group."""
    values: dict[str, Any] = {"space": space, "stored_transposed": CONV1D in group}
    for name, default in method.shared.items():
        read = settings.switch if isinstance(default, bool) else settings.number
        values[name] = read(name, default, group)
    for name, default in method.each.items():
        absent = 0 if name == _absent(method) else None
        values[name] = {expert: settings.number(name, default, group, model, absent) for model, expert in names.items()}
    try:
        stages = [(name, given) for stage in method.stages(values) for name, given in stage.items()]
    except ValueError as error:
        settings.faults.append((("merge_method",), str(error)))
        return {}
    plain = [(name, {key: _plain(value) for key, value in given.items()}) for name, given in stages]
    if len(plain) > 1:
        return {"pipeline": [{name: given} for name, given in plain]}
    ((name, given),) = plain
    return {"method": name, "parameters": given} if given else {"method": name}


def _plain(value: Any) -> Any:
    """A map that says the same of every expert as that one value."""
    if isinstance(value, dict) and all(each == value[next(iter(value))] for each in value.values()):
        return next(iter(value.values()))
    return value
