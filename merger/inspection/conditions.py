"""Conditions for CI: `overlap > 0.3`, checked before anything is read, and answered with the worst offender."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from merger.errors import CheckpointError, ConditionError, RecipeError, nearest
from merger.inspection.counters import Subject
from merger.inspection.report import Facts, Inspection, Merged, View
from merger.inspection.statistic import Statistic, named_numbers, statistics

SIGNS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
SUBJECTS: tuple[Subject, ...] = ("experts", "merged")
PLACES = {"tensor": "tensors", "layer": "layers", "projection": "projections", "kind": "kinds"}
VIEWS: dict[str, Subject] = {"task_vectors": "experts", "result": "merged"}
_FORM = re.compile(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*$")


@dataclass(frozen=True)
class Condition:
    """``[VIEW.][PLACE.]METRIC SIGN NUMBER``: about the whole model, or about any tensor, layer, projection or kind.

    Without a view it is about what the mergers are given, or about the only view that has the metric.
    """

    text: str
    view: str | None
    place: str | None
    metric: str
    sign: str
    limit: float

    @property
    def requests(self) -> set[str]:
        """The groups of statistics that must be asked for to answer the condition."""
        return {entry.request for entry in _declarations(self.metric) if entry.request is not None}


@dataclass(frozen=True)
class Offence:
    """Where a condition holds, and by what value."""

    value: float
    view: str
    place: str  # a tensor, layer, .., or the whole model
    experts: tuple[str, ...]  # none, one, or a pair

    def __str__(self) -> str:
        experts = f" ({', '.join(self.experts)})" if self.experts else ""
        return f"{self.value:.4g}{experts} in {self.place} ({self.view})"


def parse(text: str) -> Condition:
    """The condition as typed; RecipeError that offers the nearest name for an unknown one."""
    match = _FORM.match(text)
    if match is None:
        raise RecipeError(f"fail_if='{text}': expected a metric, one of > >= < <=, and a number: 'overlap > 0.3'")
    *prefixes, metric = match[1].split(".")
    if not _declarations(metric):
        raise RecipeError(f"fail_if='{text}': there is no metric {metric!r}; {nearest(metric, _metrics())}")
    places = [prefix for prefix in prefixes if prefix in PLACES]
    views = [prefix for prefix in prefixes if prefix in VIEWS]
    unknown = [prefix for prefix in prefixes if prefix not in places + views]
    if unknown:
        suggestion = nearest(unknown[0], (*PLACES, *VIEWS))
        raise RecipeError(f"fail_if='{text}': there is no place or view {unknown[0]!r}; {suggestion}")
    view = views[0] if views else _only_view(metric)
    if prefixes != views[:1] + places[:1] or not _has(view, metric):
        raise RecipeError(f"fail_if='{text}': expected [task_vectors. or result.][{'|'.join(PLACES)}.]METRIC")
    return Condition(text.strip(), view, places[0] if places else None, metric, match[2], float(match[3]))


def check(conditions: Iterable[Condition], inspection: Inspection) -> None:
    """ConditionError with a line for each condition that holds in any of its places, naming the worst offender."""
    lines = [line for line in (_offence_line(condition, inspection) for condition in conditions) if line is not None]
    if lines:
        raise ConditionError("\n".join(lines))


def _metrics() -> list[str]:
    """The statistics that conditions may be about: those of which each number has a name."""
    return list(dict.fromkeys(entry.name for subject in SUBJECTS for entry in statistics(subject) if not entry.axis))


def _declarations(metric: str) -> list[Statistic]:
    entries = [entry for subject in SUBJECTS for entry in statistics(subject)]
    return [entry for entry in entries if entry.name == metric and not entry.axis]


def _only_view(metric: str) -> str | None:
    """The view that a metric is about unless a condition names another."""
    entries = _declarations(metric)
    if any(entry.view is None and entry.subject == "experts" for entry in entries):
        return None
    return entries[0].view or "result"


def _has(view: str | None, metric: str) -> bool:
    """Whether a view has the metric."""
    entries = _declarations(metric)
    if view is None:
        return True
    return any(entry.subject == VIEWS[view] and entry.view in (None, view) for entry in entries)


def _offence_line(condition: Condition, inspection: Inspection) -> str | None:
    views = [view for view in inspection.views if view.name == condition.view]
    views = views if condition.view else inspection.merging()
    if not views:
        missing = f"a {inspection.subject} has no {condition.view or 'experts'} to look at"
        reason = inspection.notes[0] if inspection.notes else missing
        raise CheckpointError(f"fail_if='{condition.text}' cannot be told: {reason}")
    worst = _worst(condition, views, condition.place)
    if worst is None or not SIGNS[condition.sign](worst.value, condition.limit):
        return None
    tensor = None if condition.place == "tensor" else _worst(condition, views, "tensor")
    detail = "" if tensor is None else f"; of all tensors {tensor}"
    return f"{condition.text}: {worst}{detail}"


def _worst(condition: Condition, views: list[View], place: str | None) -> Offence | None:
    offences = (
        Offence(value, view.name, name, experts)
        for view in views
        for name, values in _places(view, place)
        for experts, value in named_numbers(getattr(values, condition.metric))
    )
    choose = max if condition.sign.startswith(">") else min
    return choose(offences, key=lambda offence: offence.value, default=None)


def _places(view: View, place: str | None) -> Iterator[tuple[str, Facts | Merged]]:
    if place is None:
        yield "the whole model", view.whole
    else:
        yield from getattr(view, PLACES[place]).items()
