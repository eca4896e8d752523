"""An inspection as PNG and SVG files, one of each for every figure."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from merger.charts import in_row
from merger.charts.files import write as write_drawing
from merger.checkpoint.files import check_replaceable, make_folder, replacing
from merger.errors import RecipeError
from merger.inspection.figures import charts_of
from merger.inspection.report import Inspection

KINDS = ("png", "svg")
"""The files of a figure."""


def check(folder: Path) -> None:
    """RecipeError if no plots can be drawn, or not into ``folder``; called before anything is read.

    A folder with a picture that merger did not draw is refused, for a figure might have its name.
    """
    if find_spec("matplotlib") is None:
        raise RecipeError(
            "plot=FOLDER needs matplotlib, which is not installed: pip install 'merger[plot]', or matplotlib"
        )
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"plot='{folder}': expected a folder, or a name for one")
    for picture in (path for kind in KINDS for path in sorted(folder.glob(f"*.{kind}"))):
        check_replaceable(picture, f"plot='{folder}': {picture.name}")


def write(inspection: Inspection, folder: Path) -> list[Path]:
    """Draws every figure into ``folder``, a PNG and an SVG of each; returns the files."""
    make_folder(folder)
    files = []
    for name, charts in charts_of(inspection).items():
        drawing = in_row([chart.titled() for chart in charts])
        for kind in KINDS:
            file = folder / f"{file_name(name)}.{kind}"
            with replacing(file) as new:
                write_drawing(drawing, new)
            files.append(file)
    return files


def file_name(figure: str) -> str:
    """The name of a figure's file, without its ending."""
    return re.sub(r"[^\w.-]+", "-", figure)
