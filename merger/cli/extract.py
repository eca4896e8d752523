"""`merger extract`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger._display import size_text
from merger.cli._app import USE, command
from merger.cli._options import AsJson, RunFlags, run_flags


@command(USE)
@run_flags("offline", "quiet")
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
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")] = False,
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Write one expert of an output that holds several (emr, tall_masks, byom, tsv_c) as a checkpoint."""
    from merger.outputs.extract import extract as write

    with flags.options() as options:
        result = write(folder, expert, output, options, base=base, force=force)
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        print(f"{result.output}: {result.expert}, {size_text(result.bytes_written)}, {result.seconds:.1f} s")
