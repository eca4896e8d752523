"""`merger methods`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from merger.cli._app import LEARN, command
from merger.cli._options import AsJson
from merger.cli._terminal import make_console


@command(LEARN)
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, stage or score.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, stages and scores, or show one: what it expands to, its parameters, its paper."""
    from merger.cli import _report as report

    if as_json:
        print(json.dumps(report.methods_json(name)))
    else:
        report.print_methods(name, make_console())
