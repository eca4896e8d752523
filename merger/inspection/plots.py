"""An inspection as PNG and SVG files, one of each for every figure."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from merger.charts import in_row
from merger.charts.files import write as write_drawing
from merger.errors import RecipeError
from merger.inspection.figures import charts_of
from merger.inspection.report import Inspection


def check(folder: Path) -> None:
    """RecipeError if no plots can be drawn, or not into ``folder``; called before anything is read."""
    if find_spec("matplotlib") is None:
        raise RecipeError("--plot needs matplotlib, which is not installed: pip install 'merger[plot]', or matplotlib")
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--plot {folder}: expected a folder, or a name for one")


def write(inspection: Inspection, folder: Path) -> list[Path]:
    """Draws every figure into ``folder``, a PNG and an SVG of each; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, charts in charts_of(inspection).items():
        drawing = in_row([chart.titled() for chart in charts])
        for kind in ("png", "svg"):
            file = folder / f"{file_name(name)}.{kind}"
            write_drawing(drawing, file)
            files.append(file)
    return files


def file_name(figure: str) -> str:
    """The name of a figure's file, without its ending."""
    return re.sub(r"[^\w.-]+", "-", figure)
