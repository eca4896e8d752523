"""What tables, page and plots show of a view, read from the declared statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from merger.inspection.report import Facts, Merged, View
from merger.inspection.statistic import BY_PAIR, NUMBER, Statistic, Unit, statistics


@dataclass(frozen=True)
class LayerColumn:
    """One number for each layer or projection: a column of a table, or a chart."""

    name: str
    caption: str
    unit: Unit
    number: Callable[[Facts | Merged], float | None]
    expert: int | None = None  # the place of the expert that the column is about, or None


def present(view: View) -> list[Statistic]:
    """The statistics that the whole model has in a view."""
    return [entry for entry in statistics(view.about) if _has_numbers(entry, getattr(view.whole, entry.name))]


def _has_numbers(entry: Statistic, value: object) -> bool:
    """Whether there is anything to show; of a single expert there are no pairs."""
    return any(value.values()) if entry.form is BY_PAIR and isinstance(value, dict) else value is not None


def readings(view: View) -> list[str]:
    """Sentences that say what the numbers mean, of the statistics that have such sentences."""
    entries = [entry for entry in present(view) if entry.reading is not None]
    return [line for entry in entries if entry.reading for line in entry.reading(getattr(view.whole, entry.name))]


def columns_by_layer(entry: Statistic, view: View) -> list[LayerColumn]:
    """What a statistic has by layer: nothing of a series, a column for each expert, or one of the worst of all."""
    if entry.axis is not None:
        return []
    if entry.per_expert:
        return [
            LayerColumn(f"at {name}", f"{entry.explanation} Here: {name}.", entry.unit, _of_expert(entry, name), i)
            for i, name in enumerate(getattr(view.whole, entry.name))
        ]
    extreme = "smallest" if entry.worst is min else "largest"
    group = "pairs" if entry.form is BY_PAIR else "experts"
    note = "" if entry.form is NUMBER else f" Here: the {extreme} of all {group}."
    return [
        LayerColumn(
            entry.title,
            entry.explanation + note,
            entry.unit,
            lambda values: entry.worst_of(getattr(values, entry.name)),
        )
    ]


def _of_expert(entry: Statistic, name: str) -> Callable[[Facts | Merged], float | None]:
    return lambda values: float(getattr(values, entry.name)[name])


def shortened(names: Iterable[str]) -> dict[str, str]:
    """Each name without the first part, where all names share it, and without .weight."""
    short = {name: name.removesuffix(".weight") for name in names}
    firsts = {name.partition(".")[0] if "." in name else "" for name in short.values()}
    prefix = f"{firsts.pop()}." if len(firsts) == 1 else ""
    return {name: text.removeprefix(prefix) for name, text in short.items()}
