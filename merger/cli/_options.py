"""Arguments and options that several commands take, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merger.errors import RecipeError

if TYPE_CHECKING:
    from merger.recipe.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the recipe, as in --set parameters.density=0.3."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda (all of them) or cuda:N.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="The most host memory to use, as in 2GB.", show_default=False),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what the Hub cache has; open no connection.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let calibration run model code that a checkpoint brings along.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no remarks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def load(path: Path, overrides: list[str]) -> Recipe:
    """The recipe of a file, with what ``--set`` changes."""
    from merger.recipe.recipe import Recipe

    return Recipe.load(path, overrides)


def memory_size(text: str | None) -> int | None:
    """What ``--max-memory`` says, in bytes."""
    if text is None:
        return None
    from merger.recipe.sections import byte_size

    size = byte_size(text)
    if not isinstance(size, int) or size < 1:
        raise RecipeError(f"--max-memory {text}: expected a size such as 800MB, 2GB or 1.5GiB")
    return size
