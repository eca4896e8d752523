"""Drawings as SVG: themed by the page they stand in, or complete files with colours of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from itertools import groupby

from merger._version import MARK
from merger.charts.drawing import TEXT, Cells, Drawing, Path, Point, Shape, Text
from merger.charts.paint import DARK, LIGHT, css_variables, heat_colour, strength

LEVELS = 64
"""Shades of a heat: enough that neighbours cannot be told apart."""

STYLE = (
    f":root {{ color-scheme: light dark; {css_variables(LIGHT)} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {css_variables(DARK)} }} }}\n"
    "@media print { :root { color-scheme: light; } }\n"
    "svg.chart { display: block; font-size: 12px; font-family: system-ui, sans-serif; }\n"
)
"""The style sheet of a page with themed drawings."""


def themed(drawing: Drawing, label: str) -> str:
    """An SVG element in the colours of the page, light or dark; screen readers read the ``label``, mice show it."""
    size = f'width="{drawing.width:.0f}" height="{drawing.height:.0f}"'
    box = f'viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}" role="img" aria-label="{escape(label)}"'
    return f'<svg class="chart" {size} {box}><title>{escape(label)}</title>{_elements(drawing, _Themed())}</svg>'


def standalone(drawing: Drawing) -> str:
    """A complete SVG file in light colours, which any viewer shows alike."""
    size = f'width="{drawing.width:.0f}" height="{drawing.height:.0f}"'
    box = f'viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}" font-family="sans-serif" font-size="12"'
    head = f'<?xml version="1.0" encoding="utf-8"?>\n<svg xmlns="http://www.w3.org/2000/svg" {size} {box}>'
    paper = f'<rect width="100%" height="100%" fill="{LIGHT["paper"]}"/>'
    return f"{head}\n<metadata>{MARK}</metadata>\n{paper}\n{_elements(drawing, _Plain())}\n</svg>\n"


def adaptive(drawing: Drawing, label: str) -> str:
    """A complete SVG file in light or dark colours, as the browser that shows it prefers."""
    element = themed(drawing, label).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, _, body = element.partition(">")
    paper = '<rect width="100%" height="100%" style="fill:var(--paper)"/>'
    return f"{head}>\n<metadata>{MARK}</metadata>\n<style>{STYLE}</style>\n{paper}\n{body}\n"


class _Plain:
    """Colours as they are."""

    def colour(self, role: str) -> str:
        """The colour of a role."""
        return LIGHT[role] if role else "none"

    def heat(self, heat: float, paint: str) -> str:
        """The colour of a heat in [0, 1]."""
        return heat_colour(heat, paint)


class _Themed(_Plain):
    """Colours by the variables of `STYLE`."""

    def colour(self, role: str) -> str:
        """The variable of a role."""
        return f"var(--{role})" if role else "none"

    def heat(self, heat: float, paint: str) -> str:
        """A mixture of the two ends of the scale."""
        return f"color-mix(in oklab, var(--{paint}) {strength(heat, paint):.1%}, var(--low))"


def _elements(drawing: Drawing, colours: _Plain) -> str:
    """All shapes; neighbours of the same style share a group that has it."""
    groups = groupby(drawing.shapes, lambda shape: _style(shape, colours))
    texts = ((style, "".join(_element(shape, colours) for shape in shapes)) for style, shapes in groups)
    return "\n".join(f"<g {style}>{text}</g>" for style, text in texts)


def _style(shape: Shape, colours: _Plain) -> str:
    if isinstance(shape, Cells):
        return 'class="cells" shape-rendering="crispEdges"'
    if isinstance(shape, Text):
        size = f";font-size:{shape.size:g}px" if shape.size != TEXT else ""
        return f'style="fill:{colours.colour(shape.paint)};text-anchor:{shape.anchor}{size}"'
    stroke = f";stroke-width:{shape.width:g}" if shape.stroke else ""
    dashes = f";stroke-dasharray:{' '.join(f'{dash:g}' for dash in shape.dashes)}" if shape.dashes else ""
    return f'style="fill:{colours.colour(shape.fill)};stroke:{colours.colour(shape.stroke)}{stroke}{dashes}"'


def _element(shape: Shape, colours: _Plain) -> str:
    if isinstance(shape, Path):
        return f'<path d="{_through(shape.points)}{"z" if shape.fill else ""}"/>'
    if isinstance(shape, Cells):
        return _cells(shape, colours)
    x, y = _number(shape.x), _number(shape.y)
    turn = f' transform="rotate(-90 {x} {y})"' if shape.upright else ""
    return f'<text x="{x}" y="{y}"{turn}>{escape(shape.text)}</text>'


def _through(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)


def _number(value: float) -> str:
    return f"{round(value, 1):g}"


def _cells(cells: Cells, colours: _Plain) -> str:
    """A path for each shade, of all cells that have it."""
    shades: dict[int, list[str]] = defaultdict(list)
    for y, row in enumerate(cells.heats):
        for x, heat in enumerate(row):
            if heat is not None:
                shades[round(heat * (LEVELS - 1))].append(f"M{x} {y}h1v1h-1z")
    paths = "".join(
        f'<path style="fill:{colours.heat(level / (LEVELS - 1), cells.paint)}" d="{"".join(shades[level])}"/>'
        for level in sorted(shades)
    )
    scale = f"scale({cells.width / len(cells.heats[0]):.4g} {cells.height / len(cells.heats):.4g})"
    return f'<g transform="translate({_number(cells.x)} {_number(cells.y)}) {scale}">{paths}</g>'
