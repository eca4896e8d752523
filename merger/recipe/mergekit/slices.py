"""Slices of mergekit that move, repeat or leave out layers, as the `layers` of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merger.recipe.document import KeyPath
from merger.recipe.mergekit.choices import choice_of, recipe_choices
from merger.recipe.mergekit.references import Reference
from merger.recipe.mergekit.settings import CONV1D, OUTSIDE, Settings, Slice, Source, is_inside
from merger.recipe.mergekit.table import METHODS, Method

ALL_NAMES = "."
"""The regular expression of the names of all tensors."""
_PASSTHROUGH, _SLERP, _LINEAR = METHODS["passthrough"], METHODS["slerp"], METHODS["linear"]


def layer_count(slices: Sequence[Slice]) -> int | None:
    """The number of layers in slices; None where a file lists whole models."""
    counts = [part.layers for part in slices if part.layers is not None]
    return sum(counts) if counts else None


def stay_in_place(slices: Sequence[Slice]) -> bool:
    """Whether all layers of all sources have the numbers that they have in the output."""
    start = 0
    for part in slices:
        stop = start + (part.layers or 0)
        if any(source.layers != [start, stop] for source in part.sources):
            return False
        start = stop
    return True


@dataclass(frozen=True)
class SliceEntries:
    """The slices of a file as entries of `layers`; faults go to those of ``settings``."""

    method: Method
    settings: Settings
    names: Mapping[Reference, str]  # of the recipe's experts
    start: Reference  # the recipe's base
    space: str  # of slerp and its kin: delta or weights

    def recipe_keys(self) -> dict[str, Any]:
        """The method, the rules and the entries of `layers` of the recipe."""
        slices = self.settings.slices
        merged = [part for part in slices if not self._is_copied(part)]
        if not merged:
            self._refuse_scaled_ends()
            return {"layers": [self._copy(part) for part in slices]}
        if all(self.names.keys() <= {source.model for source in part.sources} for part in merged):
            general = recipe_choices(self.method, self.settings, self.names, self.space)
            return {**general, "layers": [self._entry(part, {}) for part in slices]}
        if self.settings.conditions(self.method.parameters) != [OUTSIDE, CONV1D]:
            fault = "has no equivalent with filters, where slices merge other models than the first one"
            self.settings.faults.append((("slices",), fault))
        return {"layers": [self._entry(part, self._choice(part)) for part in slices]}

    def _is_copied(self, part: Slice) -> bool:
        """Whether a slice has one source, which the method gives back as it is, or scaled."""
        if self.method is _LINEAR and len(part.sources) == 1:
            return self.settings.switch("normalize", True, frozenset())
        return self.method is _PASSTHROUGH or (self.method is _SLERP and len(part.sources) == 1)

    def _entry(self, part: Slice, choice: Mapping[str, Any]) -> dict[str, Any]:
        """A slice that is copied, or merged by a method of its own or by the recipe's."""
        return self._copy(part) if self._is_copied(part) else {"range": self._ranges(part), **choice}

    # --- merged slices ---

    def _ranges(self, part: Slice) -> Any:
        """The layers by model, with those of the base; one range where they are the same in all models."""
        ranges = {source.model: source.layers for source in part.sources}
        if self.start not in ranges:
            fault = f"has no equivalent: names no layers of {self.start.model}, the base of the merge"
            self.settings.faults.append(((*part.path, "sources"), fault))
            return [0, part.layers]
        names = {self.start: "base", **self.names}
        common = ranges[self.start]
        if names.keys() <= ranges.keys() and all(other == common for other in ranges.values()):
            return list(common)
        experts = {name: list(ranges[model]) for model, name in self.names.items() if model in ranges}
        return {"base": list(common), **experts}

    def _choice(self, part: Slice) -> dict[str, Any]:
        """The method of one slice with its parameters, whose lists go over this slice alone."""
        if self._is_copied(part):
            return {}
        models = {source.model for source in part.sources}
        names = {model: name for model, name in self.names.items() if model in models}
        settings = Settings([part], self.settings.general, self.settings.faults)
        return choice_of(self.method, settings, names, self.space, frozenset())

    # --- copied slices ---

    def _copy(self, part: Slice) -> dict[str, Any]:
        """A slice that is copied from its source, with the factors of passthrough."""
        if len(part.sources) != 1:
            self.settings.faults.append(((*part.path, "sources"), "expected one source, which is passed through"))
            return {}
        source = part.sources[0]
        label = "base" if source.model == self.start else self.names[source.model]
        entry = {"model": label, "range": list(source.layers) if isinstance(source.layers, list) else source.layers}
        scales = self._scales(part, source) if self.method is _PASSTHROUGH else {}
        if set(scales) == {ALL_NAMES}:
            return entry if scales[ALL_NAMES] == 1 else {**entry, "scale": scales[ALL_NAMES]}
        return {**entry, "scale": scales} if scales else entry

    def _scales(self, part: Slice, source: Source) -> dict[str, Any]:
        """The factors by regular expression of the tensor's name; the first that matches counts."""
        scales: dict[str, Any] = {}
        for path, text, value in self._cases(part, source):
            pattern = ALL_NAMES if text is None else re.escape(text)
            scales.setdefault(pattern, self.settings.slice_value(path, value, part))
        if len(scales) > 1 and scales.get(ALL_NAMES) == 1:  # the factor of names that no expression matches
            del scales[ALL_NAMES]
        return scales

    def _cases(self, part: Slice, source: Source) -> Iterator[tuple[KeyPath, str | None, Any]]:
        """Yields the settings of `scale` in order of precedence, with their paths and filters; None for all names."""
        for scope, parameters in self.settings.scopes(part, source.model):
            setting = parameters.get("scale") if isinstance(parameters, Mapping) else None
            if setting is None:
                continue
            path = (*scope, "scale")
            cases = setting if isinstance(setting, list) else [setting]
            if not any(isinstance(case, Mapping) for case in cases):
                yield path, None, setting
                return
            for case in (case for case in cases if isinstance(case, Mapping)):
                text = case.get("filter")
                if text in (None, "", "*"):
                    yield path, None, case.get("value")
                    return
                yield path, str(text), case.get("value")

    def _refuse_scaled_ends(self) -> None:
        """Refuses factors of tensors outside the blocks, which mergekit scales as the first or the last layer."""
        for part in (self.settings.slices[0], self.settings.slices[-1]):
            for path, text, value in self._cases(part, part.sources[0]) if part.sources else ():
                if (text is None or not is_inside(text)) and value != 1:
                    fault = "has no equivalent: it scales embedding and head too; name layers by a filter, as mlp"
                    self.settings.faults.append((path, fault))
