"""The demo's result on the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from merger._display import html_table
from merger._version import MARK
from merger.charts import Bar, BarChart
from merger.charts.svg import STYLE, themed
from merger.demo.demo import Demonstration
from merger.demo.scores import Score, Share, percent
from merger.demo.tasks import TASKS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TITLE = "Three fine-tunes in one model"

PAGE_STYLE = """
body { background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; max-width: 46rem;
  margin: 2rem auto; padding: 0 1rem; }
caption, figcaption { color: var(--faint); text-align: left; padding-bottom: .4rem; }
figure { margin: 1.6rem 0; overflow-x: auto; }
th, td { text-align: left; padding: .15rem 1.2rem .15rem 0; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { font-weight: 500; }
.scores :is(th, td):not(:first-child) { text-align: right; }
pre { overflow-x: auto; border-left: 3px solid var(--rule); padding: .3rem .8rem; }
"""

COLUMNS = ("model", *TASKS, "all", "95 % interval")
"""The columns of the scores; the interval is that of all tasks."""

SAMPLES = "replies to the first prompt of each task"

SAMPLE_COLUMNS = ("prompt", "right answer", "base", "average")
"""The columns of the samples before that of the best merge."""


def print_report(demonstration: Demonstration, console: Console) -> None:
    """Prints the table of scores, the samples, and what they say."""
    console.print(_score_table(demonstration))
    console.print(_sample_table(demonstration))
    for sentence in demonstration.findings():
        console.print(sentence, markup=False, soft_wrap=True)


def page(demonstration: Demonstration, commands: Sequence[str]) -> str:
    """The result as one HTML page, without network or script; it ends with commands to type."""
    meta = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta name="generator" content="{MARK}">'
    )
    head = f"<title>{TITLE}</title><style>{STYLE}{PAGE_STYLE}</style>"
    body = "\n".join(_page_parts(demonstration, commands))
    return f'<!doctype html>\n<html lang="en"><head>{meta}{head}</head>\n<body>\n{body}\n</body></html>\n'


def _page_parts(demonstration: Demonstration, commands: Sequence[str]) -> Iterator[str]:
    chart = _chart(demonstration.scores)
    yield f"<h1>{TITLE}</h1>"
    yield from (f"<p>{escape(sentence)}</p>" for sentence in demonstration.findings())
    yield f"<figure><figcaption>{escape(chart.caption)}</figcaption>{themed(chart.drawing(), chart.title)}</figure>"
    yield f"<figure>{_html_samples(demonstration)}</figure>"
    yield f'<figure class="scores">{_html_scores(demonstration)}</figure>'
    yield "<p>Next, from the folder in which you started the demo:</p>"
    yield f"<pre>{escape(chr(10).join(commands))}</pre>"


def _chart(scores: Sequence[Score]) -> BarChart:
    """Bars of each model's right answers, one for each task."""
    return BarChart(
        title="Right answers by model and task",
        caption=f"Right answers to {scores[0].examples} held-out prompts of each task, with 95 % intervals",
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


def _html_samples(demonstration: Demonstration) -> str:
    return html_table(SAMPLES.capitalize(), (*SAMPLE_COLUMNS, demonstration.best.model), _samples(demonstration))


def _html_scores(demonstration: Demonstration) -> str:
    rows = ((_label(score), *_cells(score)) for score in demonstration.scores)
    return html_table(_title(demonstration).capitalize(), COLUMNS, rows)


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")


def _score_table(demonstration: Demonstration) -> Table:
    table = _table(_title(demonstration))
    table.add_column(COLUMNS[0])
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right")
    kinds = [*(score.kind for score in demonstration.scores), "end"]
    for score, (kind, next_kind) in zip(demonstration.scores, pairwise(kinds), strict=True):
        style = "bold" if score is demonstration.best else None
        table.add_row(_label(score), *_cells(score), style=style, end_section=kind != next_kind)
    return table


def _sample_table(demonstration: Demonstration) -> Table:
    table = _table(SAMPLES)
    for column in (*SAMPLE_COLUMNS, demonstration.best.model):
        table.add_column(column, no_wrap=True)
    for row in _samples(demonstration):
        table.add_row(*row)
    return table
