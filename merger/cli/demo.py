"""`merger demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import LEARN, command
from merger.cli._options import AsJson, RunFlags, run_flags
from merger.cli._terminal import make_console


@command(LEARN)
@run_flags("device", "quiet")
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo is written.")] = Path("demo"),
    force: Annotated[bool, typer.Option("--force", help="Make an earlier demo again.")] = False,
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Merge three tiny fine-tunes that come with merger, and show what each model can do."""
    from merger.demo import demo as demonstration

    with flags.options() as options:
        scores = demonstration.demo(folder, options, force=force)
    if as_json:
        print(json.dumps([{"model": s.model, "kind": s.kind, "accuracy": dict(s.accuracy)} for s in scores]))
        return
    demonstration.print_scores(scores, make_console())
    print(f"The models, the data and a recipe are in {folder}: try  merger plan {folder / 'recipe.yaml'}")
