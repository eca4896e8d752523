"""What mergekit's parameters come to, tensor by tensor: precedence, name filters, gradients over depth.

Tensors that no parameter tells apart are one group, and a group is one rule of a recipe.
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
"""Texts that a tensor's name holds, and what else sets it apart:"""
OUTSIDE = "outside any block"
CONV1D = "stored [in, out]"
MOST_FILTERS = 8
_IN_BLOCKS = re.compile(
    r"attn|attention|mlp|feed_forward|(?:[qkvo]|gate|up|down)_proj|input_layernorm|layers?\.|blocks?\.|\.\d+\."
)
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A model where it stands in the file, with its own parameters."""

    model: Reference
    path: KeyPath
    parameters: Any
    layers: Any = None  # its layer_range


@dataclass(frozen=True)
class Slice:
    """Some layers of the output, or all: what they are merged from."""

    path: KeyPath
    sources: tuple[Source, ...]
    parameters: Any = None
    layers: int | None = None  # how many; None: all


class Settings:
    """All parameters of a file, and what is wrong with those that were asked for."""

    def __init__(self, slices: Sequence[Slice], general: Sequence[tuple[KeyPath, Any]], faults: Faults) -> None:
        self.slices = slices
        self.general = general  # parameters of all slices, and where they stand
        self.faults = faults

    def scopes(self, part: Slice, model: Reference | None) -> Iterator[tuple[KeyPath, Any]]:
        """Where a parameter may be set, the first one that says something wins."""
        for source in part.sources:
            if source.model == model:
                yield (*source.path, "parameters"), source.parameters
        yield (*part.path, "parameters"), part.parameters
        yield from self.general

    def everywhere(self) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
        """Every map of parameters in the file."""
        found = {path: each for part in self.slices for s in part.sources for path, each in self.scopes(part, s.model)}
        for path, each in found.items():
            if isinstance(each, Mapping):
                yield path, each
            elif each is not None:
                self.faults.append((path, "expected parameters, as in {weight: 0.5}"))

    def conditions(self, names: Iterable[str]) -> list[str]:
        """What may set one tensor apart from another, in the order of the file."""
        settings = [each[name] for _, each in self.everywhere() for name in names if name in each]
        texts = dict.fromkeys(
            str(case["filter"])
            for setting in settings
            for case in (setting if isinstance(setting, list) else [setting])
            if isinstance(case, Mapping) and case.get("filter") not in (None, "", "*")
        )
        return [OUTSIDE, CONV1D, *texts]

    def number(self, name: str, default: Any, group: Group, model: Reference | None = None, absent: Any = None) -> Any:
        """A number for the tensors of a group, or a list of them over the depth; ``absent`` where the model is not."""
        found = []
        for part in self.slices:
            out = absent is not None and part.layers is not None and all(each.model != model for each in part.sources)
            path, value = ((), absent) if out else self._found(name, default, group, part, model)
            found.append(_each(value, partial(self._checked, path)))
        if OUTSIDE in group:  # mergekit takes the first value for what comes before the blocks, and after them
            return _shortened([_first(found[0]), _first(found[-1])])
        if len(found) == 1:
            return _shortened(found[0]) if isinstance(found[0], list) else found[0]
        return _shortened([each for part, value in zip(self.slices, found, strict=True) for each in _laid(value, part)])

    def switch(self, name: str, default: Any, group: Group) -> bool:
        """Whether something is on for the tensors of a group."""
        found = [self._found(name, default, group, part, None) for part in self.slices]
        for path, value in found:
            if value not in (True, False) or value != found[0][1]:
                self.faults.append((path, "expected true or false, the same in all layers"))
                return bool(default)
        return bool(found[0][1])

    def _found(
        self, name: str, default: Any, group: Group, part: Slice, model: Reference | None
    ) -> tuple[KeyPath, Any]:
        """Where a parameter is set for the tensors of a group, and to what."""
        given = [(path, each[name]) for path, each in self.scopes(part, model) if _has(each, name)]
        for path, setting in given:
            value = _of_group(setting, group)
            if value is not None:
                return (*path, name), value
        if default is not NEEDED:
            return (), default
        if given:
            self.faults.append(((*given[0][0], name), "says nothing of tensors that none of its filters names"))
        else:
            own: KeyPath = ("merge_method",) if model is None else ("base_model",)  # which mergekit adds to the models
            own = next((source.path for source in part.sources if source.model == model), own)
            self.faults.append((own, f"{name} is missing, which the method needs"))
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


def _has(parameters: Any, name: str) -> bool:
    return isinstance(parameters, Mapping) and name in parameters


def _of_group(setting: Any, group: Group) -> Any:
    """What a setting says of the tensors of a group: the first case whose text their names hold."""
    cases = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(case, Mapping) for case in cases):
        return None if cases == [] else setting
    for case in cases:
        if isinstance(case, Mapping) and (case.get("filter") in (None, "", "*") or str(case["filter"]) in group):
            return case.get("value")
    return None


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return [change(each) for each in value] if isinstance(value, list) else change(value)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _shortened(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def _laid(value: Any, part: Slice) -> Iterator[Any]:
    """A value for each layer of a slice: its own gradient, read at even steps."""
    count = part.layers or 1
    for i in range(count):
        yield (
            _between(value, Fraction(i, count - 1) if count > 1 else Fraction(1)) if isinstance(value, list) else value
        )


def _between(values: list[Any], depth: Fraction) -> Any:
    position = depth * (len(values) - 1)
    low = min(int(position), max(len(values) - 2, 0))
    ends = [Fraction(str(each)) for each in values[low : low + 2]]
    number = ends[0] + (ends[-1] - ends[0]) * (position - low)
    return int(number) if number.denominator == 1 else float(number)


# --- groups ---------------------------------------------------------------------------------------


def decided(conditions: Sequence[str], choose: Callable[[Group], T]) -> tuple[T, list[tuple[Group, T]]]:
    """What is chosen for most tensors, and as few rules as make it right for all: the first that matches wins.

    A name that holds several texts has a group of its own, unless the rule that it would fall to says the same.
    """
    rules: list[tuple[Group, T]] = [(frozenset(), choose(frozenset()))]
    for size in range(1, len(conditions) + 1):
        for group in map(frozenset, combinations(reversed(conditions), size)):
            if _possible(group, conditions):
                wanted = choose(group)
                if wanted != next(choice for other, choice in rules if other <= group):
                    rules.insert(0, (group, wanted))
    return rules[-1][1], rules[:-1]


def _possible(group: Group, conditions: Sequence[str]) -> bool:
    """Whether a name can hold just these texts: with one text go those within it, and no block lies outside."""
    texts = group - {OUTSIDE, CONV1D}
    within = {other for other in conditions for text in texts if other in text}
    in_blocks = CONV1D in group or any(_IN_BLOCKS.search(text) for text in texts)
    return within <= texts and not (OUTSIDE in group and in_blocks)


def matching(group: Group) -> dict[str, Any]:
    """How a rule says which tensors these are."""
    texts = group - {OUTSIDE, CONV1D}
    longest = sorted(text for text in texts if not any(text != other and text in other for other in texts))
    rule: dict[str, Any] = {}
    if OUTSIDE in group or len(longest) > 1:
        outside = r"(?!.*\.\d+\.)" if OUTSIDE in group else ""
        rule["tensors"] = "^" + outside + "".join(f"(?=.*{re.escape(text)})" for text in longest)
    elif longest:
        rule["tensors"] = re.escape(longest[0])
    if CONV1D in group:
        rule["kinds"] = ["conv1d"]
    return rule
