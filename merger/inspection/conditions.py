"""Conditions for CI: `overlap > 0.3`, checked before anything is read, and answered with the worst offender."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from merger.errors import CheckpointError, ConditionError, RecipeError, nearest
from merger.inspection.report import Facts, Inspection, Merged, View

SIGNS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
OF_EXPERTS = tuple(each.name for each in fields(Facts) if each.name not in ("elements", "holders"))
OF_MERGED = tuple(each.name for each in fields(Merged) if each.name != "elements")
METRICS = tuple(dict.fromkeys(OF_EXPERTS + OF_MERGED))
PLACES = {"tensor": "tensors", "layer": "layers", "projection": "projections", "kind": "kinds"}
VIEWS = ("task_vectors", "result")
ONLY_IN = {"effective_rank": "task_vectors"}
_FORM = re.compile(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*$")


@dataclass(frozen=True)
class Condition:
    """``[VIEW.][PLACE.]METRIC SIGN NUMBER``: about the whole model, or about any tensor, layer, projection or kind.

    Without a view it is about what the mergers are given, or about the result where only that has the metric.
    """

    text: str
    view: str | None
    place: str | None
    metric: str
    sign: str
    limit: float


@dataclass(frozen=True)
class Offence:
    """Where a condition holds, and by what value."""

    value: float
    view: str
    place: str  # a tensor, layer, .., or the whole model
    experts: tuple[str, ...]  # none, one, or a pair

    def __str__(self) -> str:
        who = f" ({', '.join(self.experts)})" if self.experts else ""
        return f"{self.value:.4g}{who} in {self.place} ({self.view})"


def parse(text: str) -> Condition:
    """The condition as written; RecipeError that offers the nearest name for one that is not known."""
    found = _FORM.match(text)
    if found is None:
        raise RecipeError(f"--fail-if {text!r}: expected a metric, one of > >= < <=, and a number: 'overlap > 0.3'")
    *before, metric = found[1].split(".")
    if metric not in METRICS:
        raise RecipeError(f"--fail-if {text!r}: there is no metric {metric!r}; {nearest(metric, METRICS)}")
    places = [each for each in before if each in PLACES]
    views = [each for each in before if each in VIEWS]
    unknown = [each for each in before if each not in places + views]
    if unknown:
        near = nearest(unknown[0], (*PLACES, *VIEWS))
        raise RecipeError(f"--fail-if {text!r}: there is no place or view {unknown[0]!r}; {near}")
    view = views[0] if views else ONLY_IN.get(metric, None if metric in OF_EXPERTS else "result")
    if before != views[:1] + places[:1] or metric not in {"task_vectors": OF_EXPERTS, "result": OF_MERGED}.get(
        view or "", METRICS
    ):
        raise RecipeError(f"--fail-if {text!r}: expected [task_vectors. or result.][{'|'.join(PLACES)}.]METRIC")
    return Condition(text.strip(), view, places[0] if places else None, metric, found[2], float(found[3]))


def check(conditions: Iterable[Condition], seen: Inspection) -> None:
    """ConditionError with a line for each condition that holds anywhere it is about, naming the worst offender."""
    held = [line for line in (_held(condition, seen) for condition in conditions) if line is not None]
    if held:
        raise ConditionError("\n".join(held))


def _held(condition: Condition, seen: Inspection) -> str | None:
    views = [view for view in seen.views if view.name == condition.view] if condition.view else seen.merging()
    if not views:
        why = seen.notes[0] if seen.notes else f"a {seen.subject} has no {condition.view or 'experts'} to look at"
        raise CheckpointError(f"--fail-if {condition.text!r} cannot be told: {why}")
    worst = _worst(condition, views, condition.place)
    if worst is None or not SIGNS[condition.sign](worst.value, condition.limit):
        return None
    deepest = _worst(condition, views, "tensor")
    more = "" if condition.place == "tensor" or deepest is None else f"; of all tensors {deepest}"
    return f"{condition.text}: {worst}{more}"


def _worst(condition: Condition, views: list[View], place: str | None) -> Offence | None:
    offences = (
        Offence(value, view.name, name, experts)
        for view in views
        for name, facts in _places(view, place)
        for experts, value in numbers(getattr(facts, condition.metric))
    )
    choose = max if condition.sign.startswith(">") else min
    return choose(offences, key=lambda offence: offence.value, default=None)


def _places(view: View, place: str | None) -> Iterator[tuple[str, Facts | Merged]]:
    if place is None:
        yield "the whole model", view.whole
    else:
        yield from getattr(view, PLACES[place]).items()


def numbers(value: Any, *names: str) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number of a fact, with the experts that it is about; of None there is none."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from numbers(each, *names, name)
    elif value is not None:
        yield names, value
