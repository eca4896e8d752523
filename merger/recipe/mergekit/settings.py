"""The values of mergekit's parameters by tensor: precedence, name filters, gradients over depth.

Tensors with the same values of all parameters are one group, and a group is one rule of a recipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

from merger.recipe.document import KeyPath
from merger.recipe.mergekit.references import Faults, Reference
from merger.recipe.mergekit.table import NEEDED

Group = frozenset[str]
"""The filters that match a tensor's name, with the markers OUTSIDE and CONV1D."""
OUTSIDE = "outside any block"
CONV1D = "stored [in, out]"
MOST_FILTERS = 8
_IN_BLOCKS = re.compile(
    r"attn|attention|mlp|feed_forward|(?:[qkvo]|gate|up|down)_proj|input_layernorm|layers?\.|blocks?\.|\.\d+\."
)
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A model in the file, with its path and its own parameters."""

    model: Reference
    path: KeyPath
    parameters: Any
    layers: Any = None  # its layer_range


@dataclass(frozen=True)
class Slice:
    """The sources of some layers of the output, or of all layers."""

    path: KeyPath
    sources: tuple[Source, ...]
    parameters: Any = None
    layers: int | None = None  # their number; None: all layers


class Settings:
    """The parameters of a file; a look-up appends its faults."""

    def __init__(self, slices: Sequence[Slice], general: Sequence[tuple[KeyPath, Any]], faults: Faults) -> None:
        self.slices = slices
        self.general = general  # parameters of all slices, and where they stand
        self.faults = faults

    def scopes(self, part: Slice, model: Reference | None) -> Iterator[tuple[KeyPath, Any]]:
        """Yields the scopes in which a parameter may be set, in the order of precedence."""
        for source in part.sources:
            if source.model == model:
                yield (*source.path, "parameters"), source.parameters
        yield (*part.path, "parameters"), part.parameters
        yield from self.general

    def parameter_maps(self) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
        """Yields every map of parameters in the file, with its path."""
        scopes = {
            path: parameters
            for part in self.slices
            for s in part.sources
            for path, parameters in self.scopes(part, s.model)
        }
        for path, parameters in (scopes | dict(self.general)).items():
            if isinstance(parameters, Mapping):
                yield path, parameters
            elif parameters is not None:
                self.faults.append((path, "expected parameters, as in {weight: 0.5}"))

    def conditions(self, names: Iterable[str]) -> list[str]:
        """Returns the conditions under which parameters of a tensor may differ, in the order of the file."""
        settings = [parameters[name] for _, parameters in self.parameter_maps() for name in names if name in parameters]
        texts = dict.fromkeys(
            str(case["filter"])
            for setting in settings
            for case in (setting if isinstance(setting, list) else [setting])
            if isinstance(case, Mapping) and case.get("filter") not in (None, "", "*")
        )
        return [OUTSIDE, CONV1D, *texts]

    def number(self, name: str, default: Any, group: Group, model: Reference | None = None, missing: Any = None) -> Any:
        """A number for the tensors of a group, or a list over the depth; ``missing`` in slices without the model."""
        values = []
        for part in self.slices:
            lacks_model = (
                missing is not None and part.layers is not None and all(item.model != model for item in part.sources)
            )
            path, value = ((), missing) if lacks_model else self._look_up(name, default, group, part, model)
            values.append(_map_items(value, partial(self._checked, path)))
        if OUTSIDE in group:  # mergekit takes the first value for what comes before the blocks, and after them
            return _shorten([_first_item(values[0]), _first_item(values[-1])])
        if len(values) == 1:
            return _of_slice(values[0], self.slices[0])
        return _shorten(
            [item for part, value in zip(self.slices, values, strict=True) for item in _layer_values(value, part)]
        )

    def slice_value(self, path: KeyPath, value: Any, part: Slice) -> Any:
        """A number, or a list over the layers of one slice."""
        return _of_slice(_map_items(value, partial(self._checked, path)), part)

    def switch(self, name: str, default: Any, group: Group) -> bool:
        """Returns the boolean value of a parameter for the tensors of a group."""
        settings = [self._look_up(name, default, group, part, None) for part in self.slices]
        for path, value in settings:
            if value not in (True, False) or value != settings[0][1]:
                self.faults.append((path, "expected true or false, the same in all layers"))
                return bool(default)
        return bool(settings[0][1])

    def _look_up(
        self, name: str, default: Any, group: Group, part: Slice, model: Reference | None
    ) -> tuple[KeyPath, Any]:
        """Returns the path and the value of a parameter for the tensors of a group."""
        candidates = [
            (path, parameters[name]) for path, parameters in self.scopes(part, model) if _has(parameters, name)
        ]
        for path, setting in candidates:
            value = _of_group(setting, group)
            if value is not None:
                return (*path, name), value
        if default is not NEEDED:
            return (), default
        if candidates:
            self.faults.append(((*candidates[0][0], name), "says nothing of tensors that none of its filters names"))
        else:
            # mergekit adds base_model to the models
            place: KeyPath = ("merge_method",) if model is None else ("base_model",)
            place = next((source.path for source in part.sources if source.model == model), place)
            self.faults.append((place, f"{name} is missing, which the method needs"))
        return (), 0

    def _checked(self, path: KeyPath, value: Any) -> Any:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            self.faults.append(
                (path, f"is {str(value)[:80]}, expected a number, a list of them, or {{filter, value}} pairs")
            )
            return 0
        return int(number) if number == int(number) else number


def is_inside(text: str) -> bool:
    """Whether only names of tensors in a block can match a filter."""
    return _IN_BLOCKS.search(text) is not None


def _has(parameters: Any, name: str) -> bool:
    return isinstance(parameters, Mapping) and name in parameters


def _of_group(setting: Any, group: Group) -> Any:
    """Returns the value of a setting for the tensors of a group: the first case whose filter matches."""
    cases = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(case, Mapping) for case in cases):
        return None if cases == [] else setting
    for case in cases:
        if isinstance(case, Mapping) and (case.get("filter") in (None, "", "*") or str(case["filter"]) in group):
            return case.get("value")
    return None


def _map_items(value: Any, change: Callable[[Any], Any]) -> Any:
    return [change(item) for item in value] if isinstance(value, list) else change(value)


def _first_item(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _shorten(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def _of_slice(value: Any, part: Slice) -> Any:
    """A value for all layers of a slice, of which a single layer takes the last."""
    if not isinstance(value, list) or not value:
        return value
    return value[-1] if part.layers == 1 else _shorten(value)


def _layer_values(value: Any, part: Slice) -> Iterator[Any]:
    """Yields a value for each layer of a slice: its gradient, interpolated at even steps."""
    count = part.layers or 1
    for i in range(count):
        yield (
            _interpolate(value, Fraction(i, count - 1) if count > 1 else Fraction(1))
            if isinstance(value, list)
            else value
        )


def _interpolate(values: list[Any], depth: Fraction) -> Any:
    position = depth * (len(values) - 1)
    low = min(int(position), max(len(values) - 2, 0))
    ends = [Fraction(str(value)) for value in values[low : low + 2]]
    number = ends[0] + (ends[-1] - ends[0]) * (position - low)
    return int(number) if number.denominator == 1 else float(number)


# --- groups ---------------------------------------------------------------------------------------


def choose_rules(conditions: Sequence[str], choose: Callable[[Group], T]) -> tuple[T, list[tuple[Group, T]]]:
    """Returns the choice of most tensors, and the fewest rules for the others; the first rule that matches wins.

    A name that matches more than one filter has its own group, unless the rule that matches it makes the same choice.
    """
    rules: list[tuple[Group, T]] = [(frozenset(), choose(frozenset()))]
    for size in range(1, len(conditions) + 1):
        for group in map(frozenset, combinations(reversed(conditions), size)):
            if _is_possible(group, conditions):
                choice = choose(group)
                if choice != next(rule_choice for rule_group, rule_choice in rules if rule_group <= group):
                    rules.insert(0, (group, choice))
    return rules[-1][1], rules[:-1]


def _is_possible(group: Group, conditions: Sequence[str]) -> bool:
    """Whether a name can match exactly the filters of a group.

    A name that matches a filter matches all substrings of it, and a name in a block does not lie outside.
    """
    texts = group - {OUTSIDE, CONV1D}
    contained = {condition for condition in conditions for text in texts if condition in text}
    in_blocks = CONV1D in group or any(map(is_inside, texts))
    return contained <= texts and not (OUTSIDE in group and in_blocks)


def rule_condition(group: Group) -> dict[str, Any]:
    """Returns the keys of a rule that match the tensors of a group."""
    texts = group - {OUTSIDE, CONV1D}
    longest = sorted(text for text in texts if not any(text != container and text in container for container in texts))
    rule: dict[str, Any] = {}
    if OUTSIDE in group or len(longest) > 1:
        lookahead = r"(?!.*\.\d+\.)" if OUTSIDE in group else ""
        rule["tensors"] = "^" + lookahead + "".join(f"(?=.*{re.escape(text)})" for text in longest)
    elif longest:
        rule["tensors"] = re.escape(longest[0])
    if CONV1D in group:
        rule["kinds"] = ["conv1d"]
    return rule
