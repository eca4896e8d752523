"""A page for a browser, in one file: no network, no script, light, dark and on paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from merger._version import MARK
from merger.charts import Chart
from merger.charts.svg import STYLE, themed
from merger.display.table import Column, Row, Table, unbroken

PAGE_STYLE = """
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { line-height: 1.2; }
h2 { border-top: 1px solid var(--rule); padding-top: 1.2rem; margin-top: 2.2rem; }
p, li, dd { max-width: 46rem; }
.opening { font-size: 1.1em; }
.findings { padding-left: 1.2rem; }
figcaption, caption, footer, dd, .note { color: var(--faint); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; }
a { color: var(--series0); }
:focus-visible { outline: 2px solid var(--series0); outline-offset: 2px; }
summary { cursor: pointer; padding: .3rem 0; }
figure { margin: .6rem 0 1.6rem; min-width: 0; max-width: 100%; }
figcaption { max-width: 30rem; padding-bottom: .4rem; }
figcaption b { color: var(--ink); font-weight: 600; }
.scroll { overflow-x: auto; }
.scroll > svg { max-width: 100%; min-width: calc(.75 * var(--width)); height: auto; }
.beside { display: flex; flex-wrap: wrap; align-items: start; gap: 0 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
caption { text-align: left; padding-bottom: .4rem; }
th { font-weight: 500; text-align: left; white-space: nowrap; }
th, td { padding: .15rem .9rem .15rem 0; }
thead th { vertical-align: bottom; border-bottom: 1px solid var(--rule); white-space: pre-line; }
thead th[title] { text-decoration: underline dotted var(--faint); text-underline-offset: 3px; cursor: help; }
tr.end :is(th, td) { padding-bottom: .7rem; }
tr.bold :is(th, td) { font-weight: 700; }
td { white-space: nowrap; }
.right { text-align: right; }
.swatch { display: inline-block; width: .7em; height: .7em; margin-right: .45em; border-radius: 2px; }
dt { font-weight: 500; }
dd { margin: 0 0 .5rem 1rem; }
pre { overflow-x: auto; border-left: 3px solid var(--rule); padding: .3rem .8rem; font-size: 14px; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; }
  nav { display: none; }
  figure, tr, svg { break-inside: avoid; }
  h2, h3, figcaption, summary { break-after: avoid; }
  .scroll { overflow: visible; }
  .scroll > svg { min-width: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


@dataclass(frozen=True)
class Charts:
    """Charts beside each other."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Fold:
    """Charts that the reader opens and closes."""

    summary: str
    charts: Sequence[Chart]
    is_open: bool = False


@dataclass(frozen=True)
class Commands:
    """Lines to type."""

    lines: Sequence[str]


Part = Table | Charts | Fold | Commands | str
"""A part of a section; a text is a paragraph."""


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    heading: str
    parts: Sequence[Part]


def page(title: str, opening: str, findings: Sequence[str], sections: Sequence[Section], note: str = "") -> str:
    """The complete page: its title, a sentence on its subject, what the figures say, a note, and the sections."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="{MARK}"><title>{escape(title)}</title><style>{STYLE}{PAGE_STYLE}</style>'
    )
    body = [
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="opening">{_prose(opening)}</p>' if opening else "",
        f'<ul class="findings">{"".join(f"<li>{_prose(line)}</li>" for line in findings)}</ul>' if findings else "",
        f'<p class="note">{_prose(note)}</p>' if note else "",
        f"{_contents(sections)}</header>",
        *map(_section, sections),
    ]
    text = "\n".join(line for line in body if line)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{text}\n</main></body></html>\n'


def _contents(sections: Sequence[Section]) -> str:
    """Links to the sections, where there are several."""
    links = "".join(
        f'<li><a href="#{_anchor(section.heading)}">{escape(section.heading)}</a></li>' for section in sections
    )
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(sections) > 1 else ""


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"


def _section(section: Section) -> str:
    parts = "\n".join(map(_part, section.parts))
    anchor = _anchor(section.heading)
    return f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(section.heading)}</h2>\n{parts}</section>'


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{_prose(part)}</p>"
    if isinstance(part, Table):
        table = _scrolling(part.title or "table", html_table(part))
        return f"<figure>{table}{_explanations(part)}</figure>"
    if isinstance(part, Commands):
        return f"<pre>{escape(chr(10).join(part.lines))}</pre>"
    if isinstance(part, Charts):
        return _beside(part.charts)
    is_open = " open" if part.is_open else ""
    return f"<details{is_open}><summary>{escape(part.summary)}</summary>{_beside(part.charts)}</details>"


def _prose(text: str) -> str:
    return escape(unbroken(text, "\u00a0"))


# --- charts -----------------------------------------------------------------------------------------


def _beside(charts: Iterable[Chart]) -> str:
    return f'<div class="beside">{"".join(map(_figure, charts))}</div>'


def _figure(chart: Chart) -> str:
    caption = f"<figcaption><b>{escape(chart.title)}</b>: {_prose(chart.caption)}</figcaption>"
    drawing = chart.drawing()
    content = _scrolling(chart.title, themed(drawing, chart.description()), f"--width:{drawing.width:.0f}px")
    return f"<figure>{caption}{content}</figure>"


def _scrolling(label: str, content: str, style: str = "") -> str:
    """Content that may be wider than the window: the keyboard scrolls it too."""
    size = f' style="{style}"' if style else ""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}"{size}>{content}</div>'


# --- tables -----------------------------------------------------------------------------------------


def html_table(table: Table) -> str:
    """The table as an HTML element; all texts are escaped."""
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    head = "".join(map(_heading, table.columns))
    body = "".join(_row(row, table.columns) for row in table.rows)
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _heading(column: Column) -> str:
    title = f' title="{escape(column.explanation)}"' if column.explanation else ""
    return f'<th scope="col"{_alignment(column)}{title}>{escape(column.heading.strip())}</th>'


def _alignment(column: Column) -> str:
    return ' class="right"' if column.justify == "right" else ""


def _row(row: Row, columns: Sequence[Column]) -> str:
    first, *cells = row.cells
    classes = " ".join(name for name, has in (("bold", row.is_bold), ("end", row.ends_section)) if has)
    swatch = f'<span class="swatch" style="background:var(--{row.swatch})"></span>' if row.swatch else ""
    data = "".join(
        f"<td{_alignment(column)}>{escape(cell.text)}</td>" for column, cell in zip(columns[1:], cells, strict=False)
    )
    mark = f' class="{classes}"' if classes else ""
    return f'<tr{mark}><th scope="row">{swatch}{escape(first.text)}</th>{data}</tr>'


def _explanations(table: Table) -> str:
    """The columns' sentences once more, for readers who cannot point at a heading."""
    terms = "".join(
        f"<dt>{escape(' '.join(column.heading.split()))}</dt><dd>{escape(column.explanation)}</dd>"
        for column in table.columns
        if column.explanation
    )
    return f"<details><summary>What the columns are</summary><dl>{terms}</dl></details>" if terms else ""
