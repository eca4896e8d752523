"""`merger extract`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import USE, command
from merger.cli._options import AsJson, Offline, Quiet
from merger.cli._terminal import progress_bar, size_text


@command(USE)
def extract(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What a run wrote that packs several experts.", show_default=False)
    ],
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="Its name in the recipe.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where the checkpoint goes.", show_default=False)
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base, where it is not where it was.", show_default=False),
    ] = None,
    offline: Offline = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write one expert of an output that holds several (emr, tall_masks, byom, tsv_c) as a checkpoint."""
    from merger.outputs.extract import extract as write

    with progress_bar(quiet) as (progress, _):
        found = write(folder, expert, output, base=base, offline=offline, force=force, progress=progress)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        print(f"{found.output}: {found.expert}, {size_text(found.bytes_written)}, {found.seconds:.1f} s")
