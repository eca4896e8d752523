"""`merger calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import MERGE, command
from merger.cli._options import RUN_FLAGS, AsJson, Overrides, RecipePath, RunFlags, load, run_flags


@command(MERGE)
@run_flags(*RUN_FLAGS)
def calibrate(
    recipe: RecipePath,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy the statistics there, one file an expert.")
    ] = None,
    gram: Annotated[
        bool, typer.Option("--gram", help="Keep Gram matrices too, as large as the models; goes on if stopped.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Run the calibration of a recipe alone, and say where each expert's statistics are."""
    from merger.engine.calibrate import calibrate as make_statistics

    with flags.options() as options:
        paths = make_statistics(
            load(recipe, overrides),
            options,
            to=to,
            gram=gram,
        )
    if as_json:
        print(json.dumps({name: str(path) for name, path in paths.items()}))
    else:
        print("calibration:\n  stats:")
        for name, path in paths.items():
            print(f"    {name}: {path}")
