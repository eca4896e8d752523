"""An inspection as one HTML page: no network, no script, light and dark.

Every heat is one hue that only gains lightness or loses it, which no kind of colour blindness hides, and
has its number beside it or a scale below it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from merger.checkpoint.files import MARK
from merger.inspection.figures import Chart, Heatmap, Line, by_layer, charts, matrices
from merger.inspection.report import Facts, Inspection, Merged, Picture, View
from merger.inspection.tables import number

DEEP = 0.6
"""From this share of the strongest colour on, light ink on it (dark ink in the dark) is the more legible."""

LEVELS = 16
"""Shades of a picture: more cannot be told apart."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1f; --faint: #5c5c66; --line: #d9d9e0;
  --low: #f3f6fb; --high: #08306b; --on-low: #1b1b1f; --on-high: #ffffff;
  --l0: #0072b2; --l1: #c44e00; --l2: #00795a; --l3: #a0467a; --l4: #8a6d00; --l5: #1b1b1f; }
@media (prefers-color-scheme: dark) { :root { --paper: #16161a; --ink: #ececf1; --faint: #a3a3ad; --line: #3a3a44;
  --low: #1f1f25; --high: #e5ae45; --on-low: #ececf1; --on-high: #16161a;
  --l0: #56b4e9; --l1: #f08a3c; --l2: #3fc79a; --l3: #e08fbf; --l4: #e8d44d; --l5: #ececf1; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h2 { border-top: 1px solid var(--line); padding-top: 1.2rem; margin-top: 2.2rem; }
p, figcaption, summary small { color: var(--faint); }
summary { cursor: pointer; padding: .3rem 0; }
figure { margin: .6rem 0 1.6rem; overflow-x: auto; }
table { border-collapse: separate; border-spacing: 1px; font-variant-numeric: tabular-nums; font-size: 13px; }
th { font-weight: 500; text-align: left; padding: .1rem .6rem .1rem 0; white-space: nowrap; }
thead th { vertical-align: bottom; padding: 0 .45rem .3rem; text-align: right; }
.down thead th { text-align: center; padding: 0 0 .3rem; }
.down thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.beside { display: flex; flex-wrap: wrap; align-items: end; gap: 0 2.5rem; }
.beside figcaption { max-width: 20rem; }
td { padding: .12rem .45rem; text-align: right; }
.heat { background: color-mix(in oklab, var(--high) calc(var(--v) * 100%), var(--low)); color: var(--on-low);
  min-width: 2.6rem; }
.maps path { fill: color-mix(in oklab, var(--high) calc(var(--v) * 100%), var(--low)); }
.heat.deep { color: var(--on-high); }
.scale { display: flex; gap: .5rem; align-items: center; font-size: 13px; margin-top: .4rem; }
.scale i { width: 10rem; height: .7rem; background: linear-gradient(in oklab 90deg, var(--low), var(--high)); }
.beside figcaption:has(+ .chart) { max-width: 30rem; }
.chart { width: 30rem; max-width: 100%; display: block; font-size: 12px; fill: var(--ink); }
.grid { stroke: var(--line); }
.diagonal { stroke: var(--faint); stroke-dasharray: 2 4; }
.line { fill: none; stroke-width: 1.8; }
.random { stroke-dasharray: 7 5; stroke-width: 1.4; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: 13px; }
.legend svg { width: 34px; height: 12px; margin-right: .4rem; }
.l0 { stroke: var(--l0); } .l1 { stroke: var(--l1); } .l2 { stroke: var(--l2); }
.l3 { stroke: var(--l3); } .l4 { stroke: var(--l4); } .l5 { stroke: var(--l5); }
.mark { stroke-width: 1.6; fill: var(--paper); }
.maps { display: flex; flex-wrap: wrap; gap: 1.2rem; }
.maps svg { width: 20rem; height: 20rem; border: 1px solid var(--line); display: block; }
"""


def page(seen: Inspection) -> str:
    """The whole page."""
    title = {"recipe": "What a merge would do", "merge": "What a merge did", "model": "Where a fine-tune changed"}
    names = ", ".join(map(escape, seen.experts))
    parts = [
        f"<h1>{title[seen.subject]}</h1>",
        f"<p>{names} against {escape(seen.base)}. Colours run from the least to the greatest value of each figure.</p>",
        *(f"<p>{escape(note)}</p>" for note in seen.notes),
        "" if seen.curves is None else _beside(map(_chart, charts(seen.curves))),
        *(_view(view, [each for each in seen.pictures if each.view == view.name]) for view in seen.views),
    ]
    head = f"<title>{title[seen.subject]}</title><style>{STYLE}</style>"
    meta = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta name="generator" content="{MARK}">'
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{meta}{head}</head>\n<body>\n{body}\n</body></html>\n'


def _view(view: View, pictures: Sequence[Picture]) -> str:
    whole = view.whole
    heading = f"<h2>{escape(view.name)}</h2>"
    table = _experts(whole) if isinstance(whole, Facts) else _outcome(whole)
    layers = [
        _details(f"{name} by layer", maps, opened=i == 0) for i, (name, maps) in enumerate(by_layer(view).items())
    ]
    return "\n".join([heading, table, _beside(map(_heatmap, matrices(view))), *layers, *map(_picture, pictures)])


def _details(summary: str, maps: Iterable[Heatmap], *, opened: bool) -> str:
    drawn = _beside(map(_heatmap, maps))
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{drawn}</details>"


def _beside(figures: Iterable[str]) -> str:
    return f'<div class="beside">{"".join(figures)}</div>'


# --- the whole model ------------------------------------------------------------------------------


def _experts(facts: Facts) -> str:
    columns: dict[str, Mapping[str, float]] = {
        "density": facts.density,
        "norm": facts.norm,
        "uneven rows": facts.uneven_rows,
        "uneven columns": facts.uneven_columns,
        "uneven blocks": facts.uneven_blocks,
        "distinct values": facts.distinct,
        **({} if facts.effective_rank is None else {"effective rank": facts.effective_rank}),
    }
    return _table(columns, {name: [each[name] for each in columns.values()] for name in facts.norm})


def _outcome(facts: Merged) -> str:
    ends = {"the base": facts.at_base, **facts.at_expert, "a blend": facts.blend}
    rows = {name: [share, facts.cosine.get(name)] for name, share in ends.items()}
    return _table(("share of positions that end there", "cosine with its task vector"), rows)


def _table(headings: Iterable[str], rows: Mapping[str, Iterable[float | None]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in headings)
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f"<td>{'' if value is None else number(value)}</td>" for value in values)
        + "</tr>"
        for name, values in rows.items()
    )
    return f"<figure><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></figure>"


# --- heatmaps -------------------------------------------------------------------------------------


def _heatmap(shown: Heatmap) -> str:
    """Numbers on a ground as strong as their place between the least and the greatest."""
    least, greatest = shown.span
    head = "".join(f"<th><span>{escape(each)}</span></th>" for each in shown.columns)
    body = "".join(
        f"<tr><th>{escape(row)}</th>{''.join(_cell(cells[each], least, greatest) for each in shown.columns)}</tr>"
        for row, cells in shown.rows.items()
    )
    table = f'<table class="{"across" if shown.across else "down"}"><thead><tr><th></th>{head}</tr></thead>'
    caption = f"<figcaption>{escape(shown.name)}: {escape(shown.what)}</figcaption>"
    return f"<figure>{caption}{table}<tbody>{body}</tbody></table>{_scale(least, greatest)}</figure>"


def _cell(value: float | None, least: float, greatest: float) -> str:
    if value is None:
        return "<td></td>"
    share = (value - least) / (greatest - least) if greatest > least else 0.0
    return f'<td class="heat{" deep" if share > DEEP else ""}" style="--v:{share:.3f}">{number(value)}</td>'


def _scale(least: float, greatest: float) -> str:
    return f'<div class="scale">{number(least)}<i></i>{number(greatest)}</div>'


# --- against density ------------------------------------------------------------------------------

WIDE, HIGH = 440, 300
"""A chart's own units, in which its letters are 12 high."""

MARKS = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "m-3-3h6v6h-6z",
    "m0-4l4 7h-8z",
    "m0-4.5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
    "m-3-3l6 6m0-6l-6 6",
    "m0-4v8m-4-4h8",
)
"""A disc, a square, a triangle, a diamond, a cross and a plus: with them no line is known by its colour alone."""


def _chart(chart: Chart) -> str:
    """Lines over density, solid for magnitude and dashed for random masks."""
    top = _ceiling(1.0 if chart.diagonal else chart.top)

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(x * WIDE, HIGH - y / top * HIGH) for x, y in zip(chart.densities, values, strict=True)]

    lines = "".join(
        _path(f"line l{i} random", points(line.random))
        + _path(f"line l{i}", points(line.magnitude))
        + "".join(_mark(i, x, y) for x, y in points(line.magnitude))
        for i, line in enumerate(chart.lines)
    )
    diagonal = _path("diagonal", [(0, HIGH), (WIDE, HIGH - HIGH / top)]) if chart.diagonal else ""
    box = f'viewBox="-44 -10 {WIDE + 60} {HIGH + 52}" role="img" aria-label="{escape(chart.name)}"'
    caption = f"<figcaption>{escape(chart.name)}: {escape(chart.what)}</figcaption>"
    return (
        f'<figure>{caption}<svg class="chart" {box}>{_axes(top)}{diagonal}{lines}</svg>{_legend(chart.lines)}</figure>'
    )


def _axes(top: float) -> str:
    """A grid of fifths and its numbers."""
    fifths = "".join(
        f'<path class="grid" d="M0 {HIGH - HIGH * i / 5:.0f}h{WIDE}"/>'
        f'<text x="-6" y="{HIGH - HIGH * i / 5 + 4:.0f}" text-anchor="end">{top * i / 5:.2g}</text>'
        f'<text x="{WIDE * i / 5:.0f}" y="{HIGH + 18}" text-anchor="middle">{i / 5:.1f}</text>'
        for i in range(6)
    )
    return f'{fifths}<text x="{WIDE / 2:.0f}" y="{HIGH + 36}" text-anchor="middle">density</text>'


def _path(kind: str, points: Iterable[tuple[float, float]]) -> str:
    return f'<path class="{kind}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def _mark(i: int, x: float, y: float) -> str:
    return f'<path class="mark l{i}" d="M{x:.1f} {y:.1f}{MARKS[i]}"/>'


def _legend(lines: Iterable[Line]) -> str:
    names = (
        f'<span><svg viewBox="0 0 34 12">{_path(f"line l{i}", [(0, 6), (34, 6)])}{_mark(i, 17, 6)}</svg>'
        f"{escape(line.name)}</span>"
        for i, line in enumerate(lines)
    )
    return f'<div class="legend">{"".join(names)}</div>'


def _ceiling(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten, for a scale whose fifths are short to write."""
    step = 10.0 ** math.floor(math.log10(value or 1))
    return next(each * step for each in (1, 2, 5, 10) if each * step >= value)


# --- one tensor -----------------------------------------------------------------------------------


def _picture(picture: Picture) -> str:
    values = [value for rows in picture.density.values() for row in rows for value in row]
    least, greatest = min(values), max(values)
    maps = "".join(
        f"<div>{_svg(rows, least, greatest)}{escape(expert)}</div>" for expert, rows in picture.density.items()
    )
    caption = f"{escape(picture.tensor)}: density in equal pieces of the matrix, rows down, columns across"
    return f'<figure><figcaption>{caption}</figcaption><div class="maps">{maps}</div>{_scale(least, greatest)}</figure>'


def _svg(rows: Sequence[Sequence[float]], least: float, greatest: float) -> str:
    """A path for each shade, of all pieces that have it."""
    shades: list[list[str]] = [[] for _ in range(LEVELS)]
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            share = (value - least) / (greatest - least) if greatest > least else 0.0
            shades[round(share * (LEVELS - 1))].append(f"M{x} {y}h1v1h-1z")
    paths = "".join(
        f'<path style="--v:{i / (LEVELS - 1):.3f}" d="{"".join(pieces)}"/>' for i, pieces in enumerate(shades) if pieces
    )
    box = f'viewBox="0 0 {len(rows[0])} {len(rows)}" preserveAspectRatio="none"'
    return f'<svg {box} shape-rendering="crispEdges">{paths}</svg>'
