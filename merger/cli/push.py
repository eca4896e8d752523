"""`merger push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import USE, command
from merger.cli._options import AsJson, RunFlags, run_flags


@command(USE)
@run_flags("quiet")
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished merge.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="org/name on the Hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it; private if not given.")] = False,
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Upload a finished merge to the Hub, with card and manifest; run again, it goes on where it broke off."""
    from merger.outputs.push import push as upload

    pushed = upload(folder, repository, public=public, quiet=flags.quiet)
    if as_json:
        print(json.dumps(pushed.as_json()))
        return
    visibility = "private" if pushed.private else "public"
    action = "was there already" if pushed.unchanged else "uploaded"
    place = f"{pushed.repository} ({visibility}) at {pushed.commit}"
    print(f"{folder}: {action}: {place}, {pushed.shards} shards as in merger.json")
