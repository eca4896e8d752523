"""`merger import`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import LEARN, command
from merger.cli._options import new_file_faults
from merger.cli._terminal import print_notes
from merger.errors import RecipeError


@command(LEARN)
def import_(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="What mergekit is given.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there, not to the terminal.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Make a recipe of a mergekit configuration, or say which of its keys have no equivalent."""
    import yaml

    from merger.checkpoint.files import replace_bytes
    from merger.recipe.document import read
    from merger.recipe.locations import location_from
    from merger.recipe.mergekit import import_mergekit

    if output is not None and (faults := new_file_faults(output, force=force)):
        raise RecipeError(faults)
    start = Path.cwd() if output is None else output.resolve().parent
    # mergekit itself reads YAML 1.1, in which `no` is false
    document = read(config, yaml.SafeLoader)
    imported = import_mergekit(document, partial(location_from, start), partial(_count_layers, start))
    print_notes(imported.notes)
    text = imported.written(config.name)
    if output is None:
        print(text, end="")
    else:
        replace_bytes(output, text.encode())


def _count_layers(start: Path, model: str) -> int | None:
    """Returns the number of a model's layers; None for one of the Hub, or one that the plan will complain of."""
    from merger.checkpoint.tensor_kinds import block_count

    try:
        config = json.loads((start / model / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return block_count(config) if isinstance(config, dict) else None
