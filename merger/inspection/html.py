"""An inspection as one HTML page: no network, no script, light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from merger._version import MARK
from merger.charts import Chart
from merger.charts.drawing import number_text
from merger.charts.svg import STYLE, themed
from merger.inspection.figures import by_layer, curve_charts, pair_charts, picture_charts, series_charts
from merger.inspection.presentation import readings
from merger.inspection.report import Inspection, View
from merger.inspection.tables import Column, Table, expert_table

PAGE_STYLE = """
body { background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h2 { border-top: 1px solid var(--rule); padding-top: 1.2rem; margin-top: 2.2rem; }
p, figcaption { color: var(--faint); }
summary { cursor: pointer; padding: .3rem 0; }
figure { margin: .6rem 0 1.6rem; overflow-x: auto; }
table { border-collapse: separate; border-spacing: 1px; font-variant-numeric: tabular-nums; font-size: 13px; }
th { font-weight: 500; text-align: left; padding: .1rem .6rem .1rem 0; white-space: nowrap; }
thead th { vertical-align: bottom; padding: 0 .45rem .3rem; text-align: right; }
td { padding: .12rem .45rem; text-align: right; }
.beside { display: flex; flex-wrap: wrap; align-items: end; gap: 0 2.5rem; }
.beside figcaption { max-width: 30rem; padding-bottom: .4rem; }
"""
TITLES = {"recipe": "What a merge would do", "merge": "What a merge did", "model": "Where a fine-tune changed"}


def page(inspection: Inspection) -> str:
    """The whole page."""
    title = TITLES[inspection.subject]
    names = ", ".join(map(escape, inspection.experts))
    base = escape(inspection.base)
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{names} against {base}. Colours run from the least to the greatest value of each chart.</p>",
        *(f"<p>{escape(note)}</p>" for note in inspection.notes),
        "" if inspection.curves is None else _beside(curve_charts(inspection.curves)),
        *(_view(view, inspection) for view in inspection.views),
    ]
    head = f"<title>{title}</title><style>{STYLE}{PAGE_STYLE}</style>"
    meta = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta name="generator" content="{MARK}">'
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{meta}{head}</head>\n<body>\n{body}\n</body></html>\n'


def _view(view: View, inspection: Inspection) -> str:
    pictures = [picture for picture in inspection.pictures if picture.view == view.name]
    layers = [
        _details(f"{name} by layer", charts, is_open=i == 0) for i, (name, charts) in enumerate(by_layer(view).items())
    ]
    parts = [
        f"<h2>{escape(view.name)}</h2>",
        _table(expert_table(view, inspection.experts)),
        *(f"<p>{escape(sentence)}</p>" for sentence in readings(view)),
        _beside([*pair_charts(view), *series_charts(view)]),
        *layers,
        *(_beside(picture_charts(picture)) for picture in pictures),
    ]
    return "\n".join(parts)


def _details(summary: str, charts: Iterable[Chart], *, is_open: bool) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{_beside(charts)}</details>"


def _beside(charts: Iterable[Chart]) -> str:
    return f'<div class="beside">{"".join(map(_figure, charts))}</div>'


def _figure(chart: Chart) -> str:
    caption = f"<figcaption>{escape(chart.title)}: {escape(chart.caption)}</figcaption>"
    return f"<figure>{caption}{themed(chart.drawing(), chart.title)}</figure>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column.heading)}</th>" for column in table.columns)
    body = "".join(
        f"<tr><th>{escape(row)}</th>{''.join(_cell(column, row) for column in table.columns)}</tr>"
        for row in table.rows
    )
    return f"<figure><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></figure>"


def _cell(column: Column, row: str) -> str:
    number = column.numbers.get(row)
    return f"<td>{'' if number is None else number_text(number)}</td>"
