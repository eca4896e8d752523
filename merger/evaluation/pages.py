"""A comparison and a search as HTML pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from merger._display import name_list
from merger.charts import Chart
from merger.display import Column, Table, text_row
from merger.display.page import Charts, Part, Section, page
from merger.evaluation.plots import comparison_chart, trials_chart
from merger.evaluation.scores import Comparison, Estimate, Row
from merger.evaluation.tables import comparison_table, legend, shortfall_lines

if TYPE_CHECKING:
    from merger.evaluation.search import SearchResult
    from merger.evaluation.search.loop import Trial

BEST_TRIALS = 10
"""Rows of the table of trials."""


def comparison_page(comparison: Comparison) -> str:
    """Base, experts and merges on the same examples: what the figures say, the table and the chart."""
    sections = [_figures("The models", comparison), *_shortfalls(comparison)]
    return page("What merges kept", opening(comparison), [*findings(comparison)], sections)


def search_page(result: SearchResult, recipe: str) -> str:
    """The best of every variant on examples that no trial has seen, and the trials that chose them."""
    count = sum(map(len, result.trials.values()))
    lines = [_winner(result), *findings(result.report)]
    sections = [
        _figures("On examples that no trial has seen", result.report),
        *_shortfalls(result.report),
        Section("The trials", [*_trials(result, recipe)]),
    ]
    start = f"{recipe}: {count} {'trial' if count == 1 else 'trials'}. {opening(result.report)}"
    return page("What a search found", start, lines, sections)


# --- what the figures say ---------------------------------------------------------------------------


def opening(comparison: Comparison) -> str:
    """The models that are compared, and the examples."""
    merges = [row.model for row in comparison.rows if row.kind == "merge"]
    experts = [row.model for row in comparison.rows if row.kind == "expert"]
    examples = ", ".join(f"{task.examples} of {name}" for name, task in comparison.tasks.items())
    models = f"{name_list(merges)} beside the base and the experts {name_list(experts)}"
    return f"{models}, on the same held-out examples: {examples}." if examples else f"{models}."


def findings(comparison: Comparison) -> Iterator[str]:
    """The merge that kept most, and the merges that are behind it or cannot be told from it."""
    merges = [row for row in comparison.rows if row.kind == "merge" and row.kept is not None]
    best = max(merges, key=_kept, default=None)
    if best is None or best.kept is None:
        return
    most = " most" if len(merges) > 1 else ""
    yield f"Of the experts' gains over the base {best.model} keeps{most}: {_share(best.kept)}."
    rest = [(row.model, row.behind) for row in merges if row is not best and row.behind is not None]
    behind = [f"{model} by {_points(estimate)}" for model, estimate in rest if estimate.low > 0]
    alike = [f"{model} (behind by {_points(estimate)})" for model, estimate in rest if estimate.low <= 0]
    if behind:
        yield f"Behind {best.model} beyond the choice of examples: {', '.join(behind)}."
    if alike:
        yield f"Not told apart from {best.model} by these examples: {', '.join(alike)}."


def _kept(row: Row) -> float:
    return row.kept.value if row.kept is not None else 0.0


def _share(estimate: Estimate) -> str:
    """94.9 % [92.3, 97.3]."""
    return f"{100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _points(estimate: Estimate) -> str:
    """13.1 points [9.6, 16.7]: a difference of shares."""
    return _share(estimate).replace(" %", " points")


def _winner(result: SearchResult) -> str:
    winner = result.winner
    variant = f"{winner.variant}, " if winner.variant else ""
    return (
        f"The best trial by the search data: {variant}trial {winner.trial}, {result.objective} "
        f"{winner.objective:.4f}, with {_setting(winner)}."
    )


# --- sections ---------------------------------------------------------------------------------------


def _figures(heading: str, comparison: Comparison) -> Section:
    parts: list[Part] = [comparison_table(comparison), *legend(comparison)]
    chart = comparison_chart(comparison)
    if chart.series:
        parts.append(Charts([chart]))
    return Section(heading, parts)


def _shortfalls(comparison: Comparison) -> list[Section]:
    """The merges that are below the base or the best expert on a task; nothing where there are none."""
    lines = [*shortfall_lines(comparison)]
    return [Section("Below the base or an expert", lines)] if lines else []


def _trials(result: SearchResult, recipe: str) -> Iterator[Part]:
    """The objective over the trials, the best trials, and their cost."""
    series = {name or recipe: [trial.objective for trial in trials] for name, trials in result.trials.items()}
    experts = sum(row.kind == "expert" for row in result.report.rows)
    charts: Sequence[Chart] = [trials_chart(series, result.objective, first_colour=experts + 1)]
    yield Charts(charts)
    trials = [trial for trials in result.trials.values() for trial in trials]
    yield _table_of_trials(trials, result.objective)
    merging, judging = (sum(getattr(trial, key) for trial in trials) for key in ("merge_seconds", "judge_seconds"))
    yield f"All trials took {merging:.1f} s of merging and {judging:.1f} s of judging."
    failures = [trial for trial in trials if trial.objective is None]
    if failures:
        yield f"{len(failures)} of them failed, the first by: {failures[0].failed}"


def _table_of_trials(trials: Sequence[Trial], objective: str) -> Table:
    ranked = sorted((trial for trial in trials if trial.objective is not None), key=lambda trial: -_objective(trial))
    shown = ranked[:BEST_TRIALS]
    columns = [
        Column("trial"),
        Column(objective, "right", "The objective on the search data, the higher the better."),
        Column("setting"),
        Column("merge, s", "right", "Seconds of the merge in memory."),
        Column("judging, s", "right", "Seconds of the forward passes on the search data."),
    ]
    rows = [
        text_row(
            f"{trial.variant} {trial.trial}".strip(),
            f"{trial.objective:.4f}",
            _setting(trial),
            f"{trial.merge_seconds:.1f}",
            f"{trial.judge_seconds:.1f}",
        )
        for trial in shown
    ]
    title = "all trials, the best first" if len(shown) == len(trials) else f"the best {len(shown)} of {len(trials)}"
    return Table(columns, rows, title)


def _objective(trial: Trial) -> float:
    return trial.objective if trial.objective is not None else float("-inf")


def _setting(trial: Trial) -> str:
    """The values of a trial: density 0.3, lambda 1."""
    values = ((name.removeprefix("parameters."), value) for name, value in trial.point.items())
    return ", ".join(f"{name} {value}" for name, value in values) or "the recipe as it is"
