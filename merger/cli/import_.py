"""`merger import`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merger.cli._app import LEARN, command
from merger.cli._options import new_file_faults
from merger.cli._terminal import print_notes
from merger.errors import RecipeError

if TYPE_CHECKING:
    from merger.recipe.mergekit import Imported


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
    imported = import_mergekit(read(config, yaml.SafeLoader), partial(location_from, start))
    _check_layers(config, imported, start)
    print_notes(imported.notes)
    text = imported.written(config.name)
    if output is None:
        print(text, end="")
    else:
        replace_bytes(output, text.encode())


def _check_layers(config: Path, imported: Imported, start: Path) -> None:
    """Refuses slices that leave out the last layers, where the base is at hand to tell."""
    from merger.recipe.mergekit import layers_of

    base = imported.recipe["base"]
    model = base if isinstance(base, str) else base["model"]
    file = start / model / "config.json"
    try:
        layers = None if imported.layers is None else layers_of(json.loads(file.read_text()))
    except (OSError, ValueError):  # a model of the Hub, or one that the plan will complain of
        return
    if layers not in (None, imported.layers):
        raise RecipeError(
            f"{config}: slices: have {imported.layers} layers, but {model} has {layers}; "
            "leaving layers out has no equivalent"
        )
