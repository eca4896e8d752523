"""The demo's result on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from merger.charts import Bar, BarChart
from merger.charts.paint import series_paint
from merger.demo.demo import Demonstration
from merger.demo.scores import Score, Share, percent
from merger.demo.tasks import TASKS
from merger.display import Cell, Column, Row, Table, text_row
from merger.display.page import Charts, Commands, Section
from merger.display.page import page as html_page
from merger.display.terminal import print_table, print_text

if TYPE_CHECKING:
    from rich.console import Console

TITLE = "Three fine-tunes in one model"

COLUMNS = ("model", *TASKS, "all", "95 % interval")
"""The columns of the scores; the interval is that of all tasks."""

SAMPLES = "replies to the first prompt of each task"

SAMPLE_COLUMNS = ("prompt", "right answer", "base", "average")
"""The columns of the samples before that of the best merge."""


def print_report(demonstration: Demonstration, console: Console) -> None:
    """Prints the table of scores, the samples, and what they say."""
    print_table(_score_table(demonstration), console)
    print_table(_sample_table(demonstration), console)
    for sentence in demonstration.findings():
        print_text(sentence, console)


def page(demonstration: Demonstration, commands: Sequence[str]) -> str:
    """The result as one HTML page, without network or script; it ends with commands to type."""
    sections = [
        Section("Right answers", [Charts([_chart(demonstration.scores)]), _score_table(demonstration)]),
        Section("Replies", [_sample_table(demonstration)]),
        Section("Next", ["From the folder in which you started the demo:", Commands(commands)]),
    ]
    opening = "Base, fine-tunes and merges of them, on prompts that no fine-tune was trained on."
    return html_page(TITLE, opening, demonstration.findings(), sections)


def _chart(scores: Sequence[Score]) -> BarChart:
    """Bars of each model's right answers, one for each task."""
    return BarChart(
        title="Right answers by model and task",
        caption=f"of {scores[0].examples} held-out prompts of each task, with 95 % intervals",
        x_label="right answers (%)",
        rows=[_label(score) for score in scores],
        series={task: [_bar(score.tasks[task]) for score in scores] for task in TASKS},
    )


def _bar(share: Share) -> Bar:
    return Bar(100 * share.value, 100 * share.low, 100 * share.high)


def _label(score: Score) -> str:
    if score.kind == "expert":
        return f"expert in {score.model}"
    return "linear (average)" if score.model == "linear" else score.model


def _cells(score: Score) -> list[str]:
    """The row of one model: each task, all tasks, and the interval of the latter, in percent."""
    total = score.total
    shares = [*score.tasks.values(), total]
    return [*(percent(share) for share in shares), f"[{100 * total.low:.0f}, {100 * total.high:.0f}]"]


def _title(demonstration: Demonstration) -> str:
    count = demonstration.scores[0].examples
    return f"right answers to {count * len(TASKS)} held-out prompts, {count} of each task"


def _samples(demonstration: Demonstration) -> Iterator[tuple[str, ...]]:
    """The rows of the samples, in the order of `SAMPLE_COLUMNS` and the best merge."""
    for sample in demonstration.samples:
        yield sample.prompt.strip(), sample.answer, sample.base, sample.average, sample.best


def _score_table(demonstration: Demonstration) -> Table:
    columns = [Column(COLUMNS[0]), *(Column(heading, "right") for heading in COLUMNS[1:])]
    kinds = [*(score.kind for score in demonstration.scores), "end"]
    rows = [
        Row(
            [Cell(_label(score)), *map(Cell, _cells(score))],
            is_bold=score is demonstration.best,
            ends_section=kind != next_kind,
            swatch=series_paint(list(TASKS).index(score.model)) if score.kind == "expert" else "",
        )
        for score, (kind, next_kind) in zip(demonstration.scores, pairwise(kinds), strict=True)
    ]
    return Table(columns, rows, _title(demonstration))


def _sample_table(demonstration: Demonstration) -> Table:
    columns = [Column(heading) for heading in (*SAMPLE_COLUMNS, demonstration.best.model)]
    return Table(columns, [text_row(*texts) for texts in _samples(demonstration)], SAMPLES)
