"""A comparison as a table: for a terminal, and as Markdown for a page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from merger.evaluation.harness import Score
from merger.evaluation.scores import Comparison, Estimate, Row

if TYPE_CHECKING:
    from rich.console import Console


def print_comparison(found: Comparison, console: Console, *, settings: bool = False) -> None:
    """One table: rows are models, columns tasks; the best merge is bold, and so are those not told apart from it.

    With ``settings`` what a search found for each merge stands below.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for heading in headings(found):
        table.add_column(heading, justify="right")
    for i, row in enumerate(found.rows):
        last_of_kind = i + 1 < len(found.rows) and found.rows[i + 1].kind != row.kind
        table.add_row(_name(row), *cells(found, row), style="bold" if _leads(row) else None, end_section=last_of_kind)
    console.print(table)
    for row in found.rows if settings else ():
        if row.setting:
            console.print(f"{row.model}: {row.setting}", markup=False, soft_wrap=True)
    for line in legend(found):
        console.print(line, markup=False, soft_wrap=True)


def headings(found: Comparison) -> list[str]:
    """What each column is."""
    tasks = [f"{name} {each.measure}" for name, each in found.tasks.items()]
    means = ["mean"] if tasks else []
    return [*tasks, *means, *(["kept", "behind the best"] if _tells_kept(found) else []), *found.lm_eval]


def cells(found: Comparison, row: Row) -> list[str]:
    """A model's figures: of a loss the perplexity too, and of each expert's task the share of its gain."""
    shown = [_task(found.tasks[name].measure, row, name) for name in found.tasks]
    if row.mean is not None:
        shown.append(f"{row.mean.value:.4f}")
    if _tells_kept(found):
        shown += ["" if each is None else _interval(each) for each in (row.kept, row.behind)]
    return [*shown, *(_score(row.lm_eval.get(name)) for name in found.lm_eval)]


def legend(found: Comparison) -> Iterator[str]:
    """What the table's figures are."""
    counted = {name: each.examples for name, each in found.tasks.items()}
    counted |= {metric.task: metric.examples for metric in found.lm_eval.values() if metric.examples is not None}
    told = ", ".join(f"{examples} of {name}" for name, examples in counted.items())
    yield f"examples: {told}; forward passes in {found.dtype}"
    if any(each.measure == "loss" for each in found.tasks.values()):
        yield "loss: mean cross-entropy of a token, its perplexity after the slash"
    if _tells_kept(found):
        yield "kept: share of the experts' gains over the base, on the task of each expert's name; in brackets 95 %"
        yield "intervals over the examples, drawn alike for all models; one that holds 0 does not tell two models apart"
    if found.lm_eval:
        names = ", ".join(dict.fromkeys(metric.task for metric in found.lm_eval.values()))
        yield f"{names}: by lm-evaluation-harness {found.versions['lm_eval']}; ± its own standard error over examples"
        yield "(about half of a 95 % interval), of each model by itself, not of a difference between two"
    yield from (f"note: {note}" for note in found.notes)


def markdown(found: Comparison) -> Iterator[str]:
    """The same table as lines of Markdown, each model with its setting, the best merge first."""
    columns = ["model", "setting", *headings(found)]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    merges = [row for row in found.rows if row.kind == "merge"]
    others = [row for row in found.rows if row.kind != "merge"]
    for row in [*others, *sorted(merges, key=lambda row: -(row.kept.value if row.kept else 0))]:
        setting = f"`{row.setting}`" if row.setting else ""
        yield f"| {' | '.join([_name(row), setting, *cells(found, row)])} |"
    yield ""
    yield from (f"- {line}" for line in legend(found))


def _task(measure: str, row: Row, name: str) -> str:
    value = row.tasks[name].value
    shown = f"{value:.4f} / {math.exp(min(value, 700)):.3g}" if measure == "loss" else f"{100 * value:.1f} %"
    share = row.kept_of.get(name)
    return shown if share is None else f"{shown} ({round(share.value, 2) + 0.0:.2f})"  # + 0.0: no -0.00


def _score(each: Score | None) -> str:
    if each is None:
        return ""
    return f"{each.value:.4f}" if each.stderr is None else f"{each.value:.4f} ± {each.stderr:.4f}"


def _interval(each: Estimate) -> str:
    return f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]"


def _tells_kept(found: Comparison) -> bool:
    return any(row.kept is not None for row in found.rows)


def _leads(row: Row) -> bool:
    """Whether a merge is the best, or not told apart from it."""
    return row.behind is not None and row.behind.low <= 0


def _name(row: Row) -> str:
    return f"expert {row.model}" if row.kind == "expert" else row.model
