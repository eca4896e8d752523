"""Drawings as files: SVG without any dependency, PNG and the rest by matplotlib, which is an optional extra."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merger._version import MARK
from merger.charts import drawing as shapes
from merger.charts.drawing import Drawing
from merger.charts.paint import LIGHT, heat_colour
from merger.charts.svg import standalone
from merger.errors import RecipeError

DOTS_PER_INCH = 150
PIXELS_PER_INCH = 96
POINTS = 72 / PIXELS_PER_INCH
"""Points of a pixel."""


def check_format(path: Path, label: str) -> None:
    """RecipeError that begins with ``label`` if no chart can be written as ``path``."""
    ending = path.suffix.lstrip(".").lower()
    if ending == "svg":
        return
    if find_spec("matplotlib") is None:
        raise RecipeError(
            f"{label}: needs matplotlib: pip install 'merger[plot]'; a name that ends in .svg needs nothing"
        )
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if ending not in formats:
        raise RecipeError(f"{label}: expected a name that ends in one of {', '.join(formats)}")


def write(drawing: Drawing, path: Path) -> None:
    """Writes a drawing in the format of the file's ending; the same drawing has the same bytes.

    The file says that merger wrote it, if its format can.
    """
    ending = path.suffix.lower()
    if ending == ".svg":
        path.write_text(standalone(drawing), encoding="utf-8")
        return
    metadata = {"Creator": MARK} if ending in (".eps", ".pdf", ".png", ".ps") else None
    _figure(drawing).savefig(path, dpi=DOTS_PER_INCH, facecolor=LIGHT["paper"], metadata=metadata)


def _figure(drawing: Drawing) -> Any:
    """The drawing on a matplotlib figure, a unit of its only axes being a pixel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(drawing.width / PIXELS_PER_INCH, drawing.height / PIXELS_PER_INCH))
    axes = figure.add_axes((0, 0, 1, 1))
    for shape in drawing.shapes:
        if isinstance(shape, shapes.Path):
            _add_path(axes, shape)
        elif isinstance(shape, shapes.Text):
            _add_text(axes, shape)
        else:
            _add_cells(axes, shape)
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.set_axis_off()
    return figure


def _add_path(axes: Any, path: shapes.Path) -> None:
    from matplotlib.patches import Polygon

    axes.add_patch(
        Polygon(
            path.points,
            closed=bool(path.fill),
            facecolor=LIGHT[path.fill] if path.fill else "none",
            edgecolor=LIGHT[path.stroke] if path.stroke else "none",
            linewidth=path.width * POINTS,
            linestyle=(0, [dash / path.width for dash in path.dashes]) if path.dashes else "-",
        )
    )


def _add_text(axes: Any, text: shapes.Text) -> None:
    across = {"ha": {"start": "left", "middle": "center", "end": "right"}[text.anchor], "va": "baseline"}
    upwards = {"va": {"start": "bottom", "middle": "center", "end": "top"}[text.anchor], "ha": "right", "rotation": 90}
    style = {"size": text.size * POINTS, "color": LIGHT[text.paint], "parse_math": False}
    axes.text(text.x, text.y, text.text, **style, **(upwards if text.upright else across))


def _add_cells(axes: Any, cells: shapes.Cells) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    heat = LinearSegmentedColormap.from_list("heat", [heat_colour(0, cells.paint), heat_colour(1, cells.paint)])
    values = [[float("nan") if value is None else value for value in row] for row in cells.heats]
    extent = (cells.x, cells.x + cells.width, cells.y + cells.height, cells.y)
    axes.imshow(values, heat, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
