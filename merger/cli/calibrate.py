"""`merger calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import MERGE, command
from merger.cli._options import (
    AsJson,
    Device,
    MaxMemory,
    Offline,
    Overrides,
    Quiet,
    RecipePath,
    TrustRemoteCode,
    load,
    memory_size,
)
from merger.cli._terminal import progress_bar


@command(MERGE)
def calibrate(
    recipe: RecipePath,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Copy the statistics there, one file an expert.")
    ] = None,
    gram: Annotated[
        bool, typer.Option("--gram", help="Keep Gram matrices too, as large as the models; goes on if stopped.")
    ] = False,
    overrides: Overrides = [],  # noqa: B006
    device: Device = "auto",
    max_memory: MaxMemory = None,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run the calibration of a recipe alone, and say where each expert's statistics are."""
    from merger.engine.merge import calibrate as make_statistics

    with progress_bar(quiet) as (progress, notice):
        paths = make_statistics(
            load(recipe, overrides),
            to=to,
            gram=gram,
            device=device,
            max_memory=memory_size(max_memory),
            offline=offline,
            trust_remote_code=trust_remote_code,
            progress=progress,
            notice=notice,
        )
    if as_json:
        print(json.dumps({name: str(path) for name, path in paths.items()}))
    else:
        print("calibration:\n  stats:")
        for name, path in paths.items():
            print(f"    {name}: {path}")
