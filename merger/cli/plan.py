"""`merger plan`."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import MERGE, command
from merger.cli._options import AsJson, Overrides, RecipePath, RunFlags, load, run_flags
from merger.cli._terminal import make_console


@command(MERGE)
@run_flags("max_memory", "offline", "trust_remote_code")
def plan(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006
    device: Annotated[
        str | None, typer.Option(help="Say which devices auto, cpu, cuda or cuda:N would be.", show_default=False)
    ] = None,
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Say what a merge would do, from headers and a few rows of local weights: nothing is downloaded or written."""
    from merger.cli import _report as report
    from merger.engine.output_plan import plan as make_plan
    from merger.engine.preflight import check_locations, preview, preview_texts
    from merger.options import RunOptions
    from merger.planning.sample import sample_changes

    loaded = load(recipe, overrides)
    output = loaded.folder / Path(loaded.output.path).expanduser()
    check_locations(loaded, output, force=True)  # an occupied output is a matter of a flag
    merge_plan = make_plan(loaded, offline=flags.offline, trust_remote_code=flags.trust_remote_code)
    gc.freeze()  # a plan of 45,000 tensors is a million objects that stay to the end: the collector need not see them
    forecast = preview(merge_plan, output, flags.memory, device)
    options = RunOptions(device or RunOptions.device, trust_remote_code=flags.trust_remote_code)
    texts = preview_texts(merge_plan, options)
    changes = sample_changes(merge_plan)
    if as_json:
        print(json.dumps(report.plan_json(merge_plan, forecast, changes, texts)))
    else:
        report.print_plan(merge_plan, forecast, changes, texts, make_console())
