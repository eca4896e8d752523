"""`merger demo`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import LEARN, command
from merger.cli._options import AsJson, RunFlags, run_flags
from merger.cli._terminal import make_console, program_name


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
    _print_next(folder)


def _print_next(folder: Path) -> None:
    """Prints the commands that merge the demo's own recipe, as they must be typed."""
    program, recipe = program_name(), shlex.quote(str(folder / "recipe.yaml"))
    force = " --force" if (folder / "merged" / "obim").exists() else ""
    print(f"The models, the data and a recipe are in {folder}. Next:")
    print(f"  {program} plan {recipe}")
    print(f"  {program} run {recipe}{force}")
