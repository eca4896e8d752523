"""An inspection as one HTML page: no network, no script, light and dark.

Every heat is one hue that only gains lightness or loses it, which no kind of colour blindness hides, and
has its number beside it or a scale below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from merger.inspection.facts import ByPair, Facts, Inspection, Merged, Picture, View
from merger.inspection.tables import most, number, shortened

DEEP = 0.6
"""From this share of the strongest colour on, light ink on it (dark ink in the dark) is the more legible."""

LEVELS = 16
"""Shades of a picture: more cannot be told apart."""

Statistic = tuple[str, str, Callable[[Any], float]]
"""What it is called, what it is, and how it is found."""

OF_EXPERTS = {
    "overlap": "of what one expert keeps, the share that another keeps too; the largest of all pairs",
    "sign_conflict": "of what two experts keep, the share where their signs differ; the largest of all pairs",
    "density": "share of positions that are not zero; the densest expert",
    "norm": "euclidean length of the task vector; the longest",
    "uneven_rows": "standard deviation over mean of what the rows keep; the most uneven expert",
    "uneven_columns": "standard deviation over mean of what the columns keep; the most uneven expert",
}

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1f; --faint: #5c5c66; --line: #d9d9e0;
  --low: #f3f6fb; --high: #08306b; --on-low: #1b1b1f; --on-high: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --paper: #16161a; --ink: #ececf1; --faint: #a3a3ad; --line: #3a3a44;
  --low: #1f1f25; --high: #e5ae45; --on-low: #ececf1; --on-high: #16161a; } }
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
.beside { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.beside figcaption { max-width: 20rem; }
td { padding: .12rem .45rem; text-align: right; }
.heat { background: color-mix(in oklab, var(--high) calc(var(--v) * 100%), var(--low)); color: var(--on-low);
  min-width: 2.6rem; }
.maps path { fill: color-mix(in oklab, var(--high) calc(var(--v) * 100%), var(--low)); }
.heat.deep { color: var(--on-high); }
.scale { display: flex; gap: .5rem; align-items: center; font-size: 13px; margin-top: .4rem; }
.scale i { width: 10rem; height: .7rem; background: linear-gradient(in oklab 90deg, var(--low), var(--high)); }
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
        *(_view(view, [each for each in seen.pictures if each.view == view.name]) for view in seen.views),
    ]
    head = f"<title>{title[seen.subject]}</title><style>{STYLE}</style>"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{meta}{head}</head>\n<body>\n{body}\n</body></html>\n'


def _view(view: View, pictures: Sequence[Picture]) -> str:
    whole = view.whole
    parts = [f"<h2>{escape(view.name)}</h2>"]
    if isinstance(whole, Facts):
        parts.append(_experts(whole))
        if len(whole.norm) > 1:
            overlap = "of what the row's expert keeps, the share that the column's keeps too"
            conflict = "of what both keep, the share where their signs differ"
            matrices = (
                _matrix("overlap", overlap, whole.overlap),
                _matrix("sign conflict", conflict, whole.sign_conflict),
                _matrix("cosine", "between task vectors", whole.cosine),
            )
            parts.append(f'<div class="beside">{"".join(matrices)}</div>')
        statistics = _of_experts(whole)
    else:
        parts.append(_outcome(whole))
        statistics = _of_merged(whole)
    parts += [_by_layer(view, statistic, opened=i == 0) for i, statistic in enumerate(statistics)]
    parts += map(_picture, pictures)
    return "\n".join(parts)


def _of_experts(whole: Facts) -> list[Statistic]:
    def of(name: str, what: str) -> Statistic:
        return name.replace("_", " "), what, lambda facts: most(getattr(facts, name))

    pairs = len(whole.norm) > 1
    return [of(name, what) for name, what in OF_EXPERTS.items() if pairs or name not in ("overlap", "sign_conflict")]


def _of_merged(whole: Merged) -> list[Statistic]:
    def of(name: str) -> Statistic:
        return f"at {name}", f"share of positions that end at {name}'s value", lambda f: float(f.at_expert[name])

    return [
        ("blend", "share of positions that end at no single input's value", lambda f: float(f.blend)),
        ("at the base", "share of positions that end at the base's value", lambda f: float(f.at_base)),
        *map(of, whole.at_expert),
        ("norm", "euclidean length of the merged task vector", lambda f: float(f.norm)),
    ]


# --- the whole model ------------------------------------------------------------------------------


def _experts(facts: Facts) -> str:
    rows = {
        name: [facts.density[name], facts.norm[name], facts.uneven_rows[name], facts.uneven_columns[name]]
        for name in facts.norm
    }
    return _table(("density", "norm", "uneven rows", "uneven columns"), rows)


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


def _matrix(name: str, what: str, pairs: ByPair) -> str:
    rows = {one: {other: pairs[one].get(other) for other in pairs} for one in pairs}
    return _heatmap(name, what, list(pairs), rows, across=True)


# --- by layer and projection ----------------------------------------------------------------------


def _by_layer(view: View, statistic: Statistic, *, opened: bool) -> str:
    """One statistic of every block's large tensors, of its small ones, and of the tensors outside any block."""
    name, what, find = statistic
    short = shortened(view.cells)
    inside = {short[layer]: cells for layer, cells in view.cells.items() if layer not in view.tensors}
    outside = {short[layer]: cells for layer, cells in view.cells.items() if layer in view.tensors}
    figures = []
    for title, columns in zip((name, f"{name} of small tensors"), _by_size(inside.values()), strict=True):
        rows = {
            layer: {each: find(cells[each]) if each in cells else None for each in columns}
            for layer, cells in inside.items()
        }
        figures += [_heatmap(title, what, columns, rows)] if columns else []
    alone = {layer: {name: find(next(iter(cells.values())))} for layer, cells in outside.items()}
    figures += [_heatmap(f"{name} outside the blocks", what, [name], alone, across=True)] if alone else []
    summary = f"<summary>{escape(name)} by layer</summary>"
    beside = f'<div class="beside">{"".join(figures)}</div>'
    return f"<details{' open' if opened else ''}>{summary}{beside}</details>"


def _by_size(layers: Iterable[Mapping[str, Facts | Merged]]) -> tuple[list[str], list[str]]:
    """The projections with many elements and those with less than a hundredth of the largest's: norms, biases.

    A figure of their own keeps the small ones' wide scatter out of the others' colours.
    """
    elements: dict[str, int] = {}
    for cells in layers:
        for projection, facts in cells.items():
            elements[projection] = max(elements.get(projection, 0), facts.elements)
    few = max(elements.values(), default=0) / 100
    return [p for p, n in elements.items() if n >= few], [p for p, n in elements.items() if n < few]


def _heatmap(
    name: str,
    what: str,
    columns: Sequence[str],
    rows: Mapping[str, Mapping[str, float | None]],
    *,
    across: bool = False,
) -> str:
    """Numbers on a ground as strong as their place between the least and the greatest; ``across``: short headings."""
    values = [value for row in rows.values() for value in row.values() if value is not None]
    least, greatest = min(values), max(values)
    head = "".join(f"<th><span>{escape(each)}</span></th>" for each in columns)
    body = "".join(
        f"<tr><th>{escape(row)}</th>{''.join(_cell(cells[each], least, greatest) for each in columns)}</tr>"
        for row, cells in rows.items()
    )
    table = f'<table class="{"across" if across else "down"}"><thead><tr><th></th>{head}</tr></thead>'
    caption = f"<figcaption>{escape(name)}: {escape(what)}</figcaption>"
    return f"<figure>{caption}{table}<tbody>{body}</tbody></table>{_scale(least, greatest)}</figure>"


def _cell(value: float | None, least: float, greatest: float) -> str:
    if value is None:
        return "<td></td>"
    share = (value - least) / (greatest - least) if greatest > least else 0.0
    return f'<td class="heat{" deep" if share > DEEP else ""}" style="--v:{share:.3f}">{number(value)}</td>'


def _scale(least: float, greatest: float) -> str:
    return f'<div class="scale">{number(least)}<i></i>{number(greatest)}</div>'


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
