"""An inspection as PNG and SVG files, drawn by matplotlib, which is an optional extra."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merger.checkpoint.files import MARK, check_replaceable, make_folder, replacing
from merger.errors import RecipeError
from merger.inspection.figures import Chart, Heatmap, by_layer, charts, matrices
from merger.inspection.report import Inspection, Picture
from merger.inspection.tables import number

SCALE = "cividis"
"""A colour scale that is the same to eyes with and without red or green, and that a grey print keeps in order."""

LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b08d00", "#333333")
MARKS = ("o", "s", "^", "D", "x", "+")
"""Beside their colours, so that no line is known by that alone."""

KINDS: dict[str, dict[str, str | None]] = {"png": {"Creator": MARK}, "svg": {"Creator": MARK, "Date": None}}
"""The files of a figure, and what they say of themselves: no date, so that the same figure has the same bytes."""


def check(folder: Path) -> None:
    """RecipeError if nothing can be plotted, or not to there; asked before anything is read.

    A folder with a picture that merger did not draw is refused, for a figure might have its name.
    """
    if find_spec("matplotlib") is None:
        raise RecipeError("--plot needs matplotlib, which is not installed: pip install 'merger[plot]', or matplotlib")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--plot {folder}: expected a folder, or a name for one")
    for picture in (path for kind in KINDS for path in sorted(folder.glob(f"*.{kind}"))):
        check_replaceable(picture, f"--plot {folder}: {picture.name}")


def write(seen: Inspection, folder: Path) -> list[Path]:
    """Draws every figure there is into ``folder``, a PNG and an SVG of each; gives the files."""
    import matplotlib

    make_folder(folder)
    files = []
    with matplotlib.rc_context({"svg.hashsalt": "merger", "svg.fonttype": "none", "font.size": 9}):
        for name, figure in _figures(seen):
            for kind, metadata in KINDS.items():
                file = folder / f"{file_name(name)}.{kind}"
                with replacing(file) as new:
                    figure.savefig(new, dpi=150, metadata=metadata, facecolor="white")
                figure.set_layout_engine("none")  # found for the first, it serves the second
                files.append(file)
    return files


def file_name(figure: str) -> str:
    """What a figure's file is called, without its ending."""
    return re.sub(r"[^\w.-]+", "-", figure)


def _figures(seen: Inspection) -> Iterator[tuple[str, Any]]:
    """Every figure with its name, drawn when it is asked for."""
    for chart in [] if seen.curves is None else charts(seen.curves):
        yield chart.name, _chart(chart)
    for view in seen.views:
        pairs = matrices(view)
        if pairs:
            yield f"{view.name}.pairs", _heatmaps(pairs)
        for name, maps in by_layer(view).items():
            yield f"{view.name}.{name}", _heatmaps(maps)
    for picture in seen.pictures:
        yield f"{picture.view}.{picture.tensor}", _picture(picture)


def _panels(widths: Iterable[float], height: float) -> tuple[Any, list[Any]]:
    """A figure with a panel of each width in a row, in inches."""
    from matplotlib.figure import Figure

    each = list(widths)
    figure = Figure(figsize=(sum(each), height), layout="constrained")
    return figure, list(figure.subplots(1, len(each), squeeze=False, width_ratios=each)[0])


def _heatmaps(maps: list[Heatmap]) -> Any:
    most = max(len(each.rows) for each in maps)
    figure, panels = _panels([max(len(each.columns) * 0.55 + 2.2, 3.2) for each in maps], most * 0.24 + 2.4)
    for each, axes in zip(maps, panels, strict=True):
        values = [[row[column] for column in each.columns] for row in each.rows.values()]
        image = axes.imshow([[float("nan") if v is None else v for v in row] for row in values], SCALE, aspect="auto")
        axes.set_title(each.name)
        axes.set_xticks(range(len(each.columns)), each.columns, rotation=0 if each.across else 90)
        axes.set_yticks(range(len(each.rows)), each.rows)
        axes.set_ylim(most - 0.5, -0.5)  # rows are as high in every panel
        axes.spines[:].set_visible(False)
        least, greatest = each.span
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value is not None:
                    light = value < (least + greatest) / 2
                    axes.text(
                        x, y, number(value), ha="center", va="center", size=6.5, color="white" if light else "black"
                    )
        figure.colorbar(image, ax=axes, shrink=0.6)
    return figure


def _chart(chart: Chart) -> Any:
    figure, (axes,) = _panels([6.4], 4.4)
    for line, colour, mark in zip(chart.lines, LINES, MARKS, strict=False):
        axes.plot(chart.densities, line.magnitude, color=colour, marker=mark, ms=4.5, label=line.name)
        axes.plot(chart.densities, line.random, color=colour, ls="--", lw=1.2)
    if chart.diagonal:
        axes.plot([0, 1], [0, 1], color="#888888", ls=":", lw=1)
    axes.set(title=chart.name, xlabel="density", xlim=(0, 1), ylim=(0, None))
    axes.grid(color="#e0e0e0")
    axes.legend(title=chart.what.replace("; ", "\n"), frameon=False)
    return figure


def _picture(picture: Picture) -> Any:
    figure, panels = _panels([3.6] * len(picture.density), 3.8)
    greatest = max(value for rows in picture.density.values() for row in rows for value in row)
    for (expert, rows), axes in zip(picture.density.items(), panels, strict=True):
        image = axes.imshow(rows, SCALE, vmin=0, vmax=greatest or 1, aspect="auto", interpolation="nearest")
        axes.set(title=expert, xticks=[], yticks=[], xlabel="columns", ylabel="rows")
    figure.colorbar(image, ax=panels, shrink=0.8)
    figure.suptitle(f"{picture.tensor} ({picture.view}): density")
    return figure
