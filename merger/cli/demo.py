"""`merger demo`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merger.cli._app import LEARN, command
from merger.cli._options import AsJson, RunFlags, run_flags
from merger.cli._terminal import make_console, program_name
from merger.display.terminal import print_text

if TYPE_CHECKING:
    from merger.demo.scores import Score


@command(LEARN)
@run_flags("device", "quiet")
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo is written.")] = Path("demo"),
    force: Annotated[bool, typer.Option("--force", help="Make an earlier demo again.")] = False,
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Merge three tiny fine-tunes that come with merger, and show what each model can do."""
    from merger.checkpoint.files import replace_bytes
    from merger.demo import demo as demonstration
    from merger.demo import report

    with flags.options() as options:
        result = demonstration.demo(folder, options, force=force)
    commands, page = _next_commands(folder), folder / demonstration.PAGE
    replace_bytes(page, report.page(result, commands).encode())
    if as_json:
        print(json.dumps([_as_json(score) for score in result.scores]))
        return
    terminal = make_console()
    report.print_report(result, terminal)
    print()
    print_text(f"{page} shows this with a picture. Models, texts and recipes are in {folder}. Next:", terminal)
    for line in commands:
        print(f"  {line}")


def _as_json(score: Score) -> dict[str, Any]:
    return {
        "model": score.model,
        "kind": score.kind,
        "examples": score.examples,  # of each task
        "accuracy": {task: share.value for task, share in score.tasks.items()},
        "interval": {task: [share.low, share.high] for task, share in score.tasks.items()},
    }


def _next_commands(folder: Path) -> list[str]:
    """The commands that merge by the demo's recipe for experts with text, as they must be typed."""
    program, recipe = program_name(), shlex.quote(str(folder / "featcal.yaml"))
    force = " --force" if (folder / "merged" / "featcal").exists() else ""
    return [f"{program} plan {recipe}", f"{program} run {recipe}{force}"]
