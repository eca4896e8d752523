"""A comparison as a table, with sentences on it, and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from merger import display
from merger.charts.paint import series_paint
from merger.display import Cell, Column, Table
from merger.display.terminal import print_table, print_text
from merger.evaluation.harness import Score
from merger.evaluation.scores import Comparison, Estimate, Row, Shortfall

if TYPE_CHECKING:
    from rich.console import Console


def print_comparison(comparison: Comparison, console: Console, *, settings: bool = False) -> None:
    """Prints one table: rows are models, columns are tasks; the best merge, and merges within its interval, are bold.

    With ``settings`` the setting that a search chose for each merge is printed below.
    """
    print_table(comparison_table(comparison), console)
    for row in comparison.rows if settings else ():
        if row.setting:
            print_text(f"{row.model}: {row.setting}", console)
    for line in legend(comparison):
        print_text(line, console)


def comparison_table(comparison: Comparison) -> Table:
    """A row for each model, marked with the colour of its expert, and a column for each figure."""
    columns = [Column(heading, "right", explanation) for heading, explanation in headings(comparison).items()]
    experts = [row.model for row in comparison.rows if row.kind == "expert"]
    kinds = [*(row.kind for row in comparison.rows), "end"]
    rows = [
        display.Row(
            [Cell(_name(row)), *map(Cell, cells(comparison, row))],
            is_bold=_is_best(row),
            ends_section=kind != next_kind,
            swatch=series_paint(experts.index(row.model)) if row.kind == "expert" else "",
        )
        for row, (kind, next_kind) in zip(comparison.rows, pairwise(kinds), strict=True)
    ]
    return Table([Column("model"), *columns], rows)


def print_shortfalls(comparison: Comparison, console: Console) -> None:
    """Prints the lines of `shortfall_lines`."""
    for line in shortfall_lines(comparison):
        print_text(line, console)


def shortfall_lines(comparison: Comparison) -> Iterator[str]:
    """A sentence on each merge that is below the base or the best single expert on a task, and one on its brackets."""
    rows = [row for row in comparison.rows if row.below]
    for row in rows:
        better_base, better_expert = (
            ", ".join(_shortfall(comparison, shortfall) for shortfall in row.below if shortfall.kind == kind)
            for kind in ("base", "expert")
        )
        clauses = [("the base", better_base), ("the best single expert", better_expert)]
        text = " and ".join(f"below {reference} on {tasks}" for reference, tasks in clauses if tasks)
        yield f"{row.model} is {text}"
    if rows:
        yield "in brackets: the 95 % interval of the difference; a difference whose interval holds 0 is not named"


def _shortfall(comparison: Comparison, shortfall: Shortfall) -> str:
    """The task with the difference of its measure."""
    estimate = shortfall.difference
    expert = f"expert {shortfall.model}, " if shortfall.kind == "expert" else ""
    if comparison.tasks[shortfall.task].measure == "loss":
        difference = f"loss {estimate.value:.3g} higher [{estimate.low:.3g}, {estimate.high:.3g}]"
    else:
        value, low, high = (100 * share for share in (estimate.value, estimate.low, estimate.high))
        difference = f"accuracy {value:.3g} points lower [{low:.3g}, {high:.3g}]"
    return f"{shortfall.task} ({expert}{difference})"


def headings(comparison: Comparison) -> dict[str, str]:
    """The column headings after the model's name, each with a sentence on the column."""
    columns = {f"{name} {task.measure}": _explanation(name, task.measure) for name, task in comparison.tasks.items()}
    if columns:
        columns["mean"] = "The mean over the tasks."
    if _has_shares(comparison):
        columns["kept"] = "The mean share of the experts' gains over the base, with its 95 % interval."
        columns["behind the best"] = "How much less was kept than by the best merge; an interval with 0 tells nothing."
    return columns | {name: f"{name} by lm-evaluation-harness." for name in comparison.lm_eval}


def _explanation(task: str, measure: str) -> str:
    if measure == "loss":
        figure = f"Cross-entropy of a token on {task}, less is better; its perplexity after the slash"
    else:
        figure = f"Share of right answers on {task}"
    return f"{figure}; in brackets the share of the expert's gain that is kept, where there is one."


def cells(comparison: Comparison, row: Row) -> list[str]:
    """The cells of one model: measures with perplexity and share of the expert's gain, mean, shares, lm-eval scores."""
    figures = [_task(comparison.tasks[name].measure, row, name) for name in comparison.tasks]
    if row.mean is not None:
        figures.append(f"{row.mean.value:.4f}")
    if _has_shares(comparison):
        figures += ["" if estimate is None else _interval(estimate) for estimate in (row.kept, row.behind)]
    return [*figures, *(_score(row.lm_eval.get(name)) for name in comparison.lm_eval)]


def legend(comparison: Comparison) -> Iterator[str]:
    """Lines below the table that explain its figures."""
    example_counts = {name: task.examples for name, task in comparison.tasks.items()}
    example_counts |= {
        metric.task: metric.examples for metric in comparison.lm_eval.values() if metric.examples is not None
    }
    counts = ", ".join(f"{examples} of {name}" for name, examples in example_counts.items())
    yield f"examples: {counts}; forward passes in {comparison.dtype}"
    if any(task.measure == "loss" for task in comparison.tasks.values()):
        yield "loss: mean cross-entropy of a token, its perplexity after the slash"
    if _has_shares(comparison):
        yield (
            "kept: share of the experts' gains over the base, on the task of each expert's name; in brackets 95 % "
            "intervals over the examples, drawn alike for all models; one that holds 0 does not tell two models apart"
        )
    if comparison.lm_eval:
        names = ", ".join(dict.fromkeys(metric.task for metric in comparison.lm_eval.values()))
        version = comparison.versions["lm_eval"]
        yield (
            f"{names}: by lm-evaluation-harness {version}; ± its own standard error over examples (about half of a "
            "95 % interval), of each model by itself, not of a difference between two"
        )
    yield from (f"note: {note}" for note in comparison.notes)


def markdown(comparison: Comparison) -> Iterator[str]:
    """The same table as lines of Markdown, each model with its setting, the best merge first."""
    columns = ["model", "setting", *headings(comparison)]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    merges = [row for row in comparison.rows if row.kind == "merge"]
    reference_rows = [row for row in comparison.rows if row.kind != "merge"]
    for row in [*reference_rows, *sorted(merges, key=lambda row: -(row.kept.value if row.kept else 0))]:
        setting = f"`{row.setting}`" if row.setting else ""
        yield f"| {' | '.join([_name(row), setting, *cells(comparison, row)])} |"
    yield ""
    yield from (f"- {line}" for line in legend(comparison))


def _task(measure: str, row: Row, name: str) -> str:
    value = row.tasks[name].value
    text = f"{value:.4f} / {math.exp(min(value, 700)):.3g}" if measure == "loss" else f"{100 * value:.1f} %"
    share = row.kept_of.get(name)
    return text if share is None else f"{text} ({round(share.value, 2) + 0.0:.2f})"  # + 0.0: no -0.00


def _score(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4f}" if score.stderr is None else f"{score.value:.4f} ± {score.stderr:.4f}"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _has_shares(comparison: Comparison) -> bool:
    return any(row.kept is not None for row in comparison.rows)


def _is_best(row: Row) -> bool:
    """Whether a merge is the best one, or its interval of the difference to the best one includes 0."""
    return row.behind is not None and row.behind.low <= 0


def _name(row: Row) -> str:
    return f"expert {row.model}" if row.kind == "expert" else row.model
