"""The command line, and the decorator by which a file adds its command to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from merger._version import VERSION

F = TypeVar("F", bound=Callable[..., Any])
MERGE, JUDGE, USE, LEARN = "Make a merge", "Judge models", "Use a merge", "Start and look up"
"""The panels of `merger --help`."""

app = typer.Typer(
    help="Merge language-model checkpoints by a YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(panel: str) -> Callable[[F], F]:
    """Adds a function as the command of its name, without a trailing underscore, in a panel of `merger --help`."""

    def register(function: F) -> F:
        app.command(function.__name__.rstrip("_"), rich_help_panel=panel)(function)
        return function

    return register


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"merger {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Merge language-model checkpoints by a YAML recipe."""
