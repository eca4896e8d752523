"""Declaring a statistic: one decorated function makes it part of tables, JSON, conditions, page, plots and docs.

    @statistic(form=BY_PAIR, unit="share", formula="|A ∩ B| / |A|", counters=[VectorCounter], order=10)
    def overlap(vectors: VectorSums) -> Array:
        \"\"\"Of the positions of expert A, the share that expert B has too.\"\"\"
        ...

The function gets the sums of its counters, of one matrix or added up over many, and returns the numbers; its name is
the key in JSON, and the docstring's first paragraph explains the statistic wherever it is shown.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy

from merger.inspection.counters import Counter, Subject, SumsByCounter

Array = numpy.ndarray[Any, Any]
F = TypeVar("F", bound=Callable[..., Any])
Unit = Literal["share", "cosine", "length", "ratio", "count", "squared length", "number"]
Request = Literal["rank", "subspaces"]
"""What a user asks for to get statistics that take longer: the options --rank and --subspaces."""


# --- forms ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """The subject of a statistic's numbers, and their rendering for JSON."""

    about: str
    annotation: Any  # the type of the value in JSON
    render: Callable[[Any, Sequence[str]], Any]  # from the numbers and the experts' names


def _number(value: Any, experts: Sequence[str]) -> float:
    return float(value)


def _by_expert(values: Array, experts: Sequence[str]) -> dict[str, Any]:
    return dict(zip(experts, values.tolist(), strict=True))


def _by_pair(values: Array, experts: Sequence[str]) -> dict[str, dict[str, Any]]:
    rows = {name: _by_expert(row, experts) for name, row in zip(experts, values, strict=True)}
    return {name: {peer: value for peer, value in row.items() if peer != name} for name, row in rows.items()}


def _series(values: Array, experts: Sequence[str]) -> list[Any]:
    return list(values.tolist())


NUMBER = Form("the model", float, _number)
BY_EXPERT = Form("an expert", dict[str, float], _by_expert)
COUNT_BY_EXPERT = Form("an expert", dict[str, int], _by_expert)
BY_PAIR = Form("a pair of experts", dict[str, dict[str, float]], _by_pair)
SERIES = Form("all experts", list[float], _series)


@dataclass(frozen=True)
class Axis:
    """What the numbers of a series stand at."""

    name: str
    points: Callable[[int], Sequence[float]]  # of the number of experts


# --- declarations ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistic:
    """One declared statistic."""

    name: str
    subject: Subject
    form: Form
    unit: Unit
    formula: str
    counters: tuple[type[Counter], ...]
    compute: Callable[..., Any]
    explanation: str
    order: int  # its place in tables and pages
    label: str  # the heading of its column in tables
    row: str = ""  # of a single number: its row in tables that have a row for each expert
    axis: Axis | None = None  # of a series
    symmetric: bool = True  # of pairs: whether A, B and B, A have the same number
    view: str | None = None  # the only view that has it
    request: Request | None = None
    in_layers: bool = False  # whether tables by layer have a column of it
    per_expert: bool = False  # whether those have one for each expert, not the worst of all
    worst: Callable[[Iterable[float]], float] = field(default=max)
    reading: Callable[[Any], Iterable[str]] | None = None  # sentences about its value, by what is usual

    @property
    def title(self) -> str:
        """Its name as a chart's title has it."""
        return self.name.replace("_", " ")

    def value(self, sums: SumsByCounter, experts: Sequence[str]) -> Any:
        """The named numbers; None in views, or of tensors, that have none."""
        if any(counter not in sums for counter in self.counters):
            return None
        numbers = self.compute(*(sums[counter] for counter in self.counters))
        return None if numbers is None else self.form.render(numbers, experts)

    def applies(self, view: str, requests: Iterable[str]) -> bool:
        """Whether it is computed in a view, given what the user asks for."""
        return self.view in (None, view) and (self.request is None or self.request in requests)

    def worst_of(self, value: Any) -> float | None:
        """The worst number of a value; None where it has no number, as overlap has of a single expert."""
        values = [number for _, number in named_numbers(value)]
        return self.worst(values) if values else None


_DECLARED: dict[tuple[Subject, str], Statistic] = {}


def statistic(
    *,
    form: Form,
    unit: Unit,
    formula: str,
    counters: Sequence[type[Counter]],
    order: int,
    subject: Subject = "experts",
    name: str = "",
    label: str = "",
    **traits: Any,
) -> Callable[[F], F]:
    """Declares a statistic; ``name`` is by default the function's."""

    def declare(function: F) -> F:
        key = name or function.__name__
        assert (subject, key) not in _DECLARED, f"two statistics of {subject} are named {key}"
        paragraph = (inspect.getdoc(function) or "").partition("\n\n")[0]
        _DECLARED[subject, key] = Statistic(
            name=key,
            subject=subject,
            form=form,
            unit=unit,
            formula=formula,
            counters=tuple(counters),
            compute=function,
            explanation=" ".join(paragraph.split()),
            order=order,
            label=label or key.replace("_", " "),
            **traits,
        )
        return function

    return declare


def statistics(subject: Subject) -> list[Statistic]:
    """The declared statistics of a subject, in their order."""
    import merger.inspection.statistics  # noqa: F401 declares them

    return sorted((entry for (of, _), entry in _DECLARED.items() if of == subject), key=lambda entry: entry.order)


def named_numbers(value: Any, *names: str) -> Iterable[tuple[tuple[str, ...], float]]:
    """Every number of a value with the experts that it is about; a value of None has no number."""
    if isinstance(value, Mapping):
        for name, nested in value.items():
            yield from named_numbers(nested, *names, name)
    elif value is not None:
        yield names, value


# --- arithmetic of statistics ---------------------------------------------------------------------


def array(numbers: Any) -> Array:
    """Nested tuples of numbers as an array; NumPy is four times as fast as torch where arrays have a few elements."""
    return numpy.array(numbers)


def share(part: Array, total: Array | float) -> Array:
    """part / total in float64, 0 where the total is 0."""
    totals = numpy.asarray(total, dtype=numpy.float64)
    return numpy.where(totals != 0, part / numpy.where(totals != 0, totals, 1), 0.0)
