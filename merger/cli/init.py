"""`merger init`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import LEARN, command
from merger.cli._options import new_file_faults
from merger.cli._terminal import print_notes
from merger.errors import CheckpointError, RecipeError


@command(LEARN)
def init(
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="The base: a folder, or org/name on the Hub.", show_default=False),
    ],
    experts: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]EXPERT",
            help="Its fine-tunes or adapters; the name is the folder's, if not given.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="NAME=FILE", help="Text of an expert, once for each; the method then learns from it."
        ),
    ] = [],  # noqa: B006
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RECIPE", help="Where to write it.")] = Path(
        "merge.yaml"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a recipe to begin with, by the best method for what there is; every choice has its reason beside it."""
    from merger.checkpoint.files import replace_bytes
    from merger.recipe.starter import starter_recipe

    faults = new_file_faults(output, force=force)
    try:
        starter = starter_recipe(base, experts, data, output)
        faults += _text_faults(starter.files)
    except RecipeError as error:
        faults += error.faults
    if faults:
        raise RecipeError(faults)
    replace_bytes(output, starter.text.encode())
    print_notes(starter.notes)
    file = shlex.quote(str(output))
    print(f"{output}: {starter.method} of {', '.join(starter.experts)}. Next:")
    print(f"  merger plan {file}")
    print(f"  merger run {file}")


def _text_faults(files: Iterable[str]) -> Iterator[str]:
    """The faults of files that calibration cannot read."""
    from merger.calibration.samples import check_text

    for file in files:
        try:
            check_text(file, Path())
        except CheckpointError as error:
            yield str(error)
