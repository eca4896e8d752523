"""`merger demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._options import AsJson, Device, Quiet
from merger.cli._terminal import make_console


def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo is written.")] = Path("demo"),
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Make an earlier demo again.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge three tiny fine-tunes that come with merger, and show what each model can do."""
    from merger.demo import demo as demonstration

    console = make_console(stderr=True)
    tell = (lambda line: None) if quiet else (lambda line: console.print(line, markup=False))
    scores = demonstration.demo(folder, force=force, device=device, tell=tell)
    if as_json:
        print(json.dumps([{"model": s.model, "kind": s.kind, "accuracy": dict(s.accuracy)} for s in scores]))
        return
    demonstration.print_scores(scores, make_console())
    print(f"The models, the data and a recipe are in {folder}: try  merger plan {folder / 'recipe.yaml'}")
