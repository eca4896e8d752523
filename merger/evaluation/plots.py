"""The charts of a comparison and of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from merger.charts import Bar, BarChart, LineChart, Series, in_row
from merger.charts.files import check_format, write
from merger.checkpoint.files import check_replaceable, replacing
from merger.evaluation.scores import Comparison, Estimate


def check_plot(path: Path | None) -> None:
    """RecipeError if a chart was asked for that cannot be written as ``path``; called before anything is computed."""
    if path is None:
        return
    check_replaceable(path, f"plot='{path}'")
    check_format(path, f"plot='{path}'")


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Draws the share of each expert's gain, and of all, that each merge kept: bars with their intervals."""
    with replacing(path) as new:
        write(in_row([comparison_chart(comparison).titled()]), new)


def plot_trials(values: Mapping[str, Sequence[float | None]], objective: str, path: Path) -> None:
    """Draws the objective over the trials of each variant: points, and the best so far as a line."""
    with replacing(path) as new:
        write(in_row([trials_chart(values, objective).titled()]), new)


def comparison_chart(comparison: Comparison) -> BarChart:
    """A row of bars for each merge, a bar for each expert and one for their mean."""
    merges = [row for row in comparison.rows if row.kind == "merge"]
    experts = [row.model for row in comparison.rows if row.kind == "expert"]
    estimates = {name: [row.kept_of.get(name) for row in merges] for name in experts}
    estimates["mean"] = [row.kept for row in merges]
    series = {name: [_bar(estimate) for estimate in row] for name, row in estimates.items() if any(row)}
    return BarChart(
        title="share of the experts' gains that each merge kept",
        caption="with 95 % intervals",
        x_label="share of the gain",
        rows=[row.model for row in merges],
        series=series,
        numbers=[[*experts, "mean"].index(name) for name in series],
    )


def _bar(estimate: Estimate | None) -> Bar | None:
    return None if estimate is None else Bar(estimate.value, estimate.low, estimate.high)


def trials_chart(values: Mapping[str, Sequence[float | None]], objective: str, *, first_colour: int = 0) -> LineChart:
    """Points for the trials of each variant, and steps for the best so far; a trial without a value is left out."""
    series = []
    for number, (variant, trials) in enumerate(values.items(), first_colour):
        points = [(float(place), value) for place, value in enumerate(trials, 1) if value is not None]
        if points:
            best = accumulate((value for _, value in points), max)
            steps = [(place, value) for (place, _), value in zip(points, best, strict=True)]
            series += [Series("", points, number, "dots"), Series(variant, steps, number, "steps")]
    return LineChart(
        title=f"{objective} by trial",
        caption="points: trials; line: the best so far; the scale does not begin at 0",
        x_label="trial",
        series=series,
        from_zero=False,
    )
