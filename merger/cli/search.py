"""`merger search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import MERGE, command
from merger.cli._options import (
    AsJson,
    Device,
    MaxMemory,
    Offline,
    Overrides,
    Quiet,
    RecipePath,
    TrustRemoteCode,
    memory_size,
)
from merger.cli._terminal import make_console, progress_bar
from merger.cli.evaluate import AllowCalibrationText


@command(MERGE)
def search(
    recipe: RecipePath,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Record, best recipe and report; RECIPE.search if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start over where another search is on record.")] = False,
    allow_calibration_text: AllowCalibrationText = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the objective over the trials (needs matplotlib).")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    device: Device = "auto",
    max_memory: MaxMemory = None,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find the values that a recipe leaves open with {search: ...}, by merges in memory judged on held-out examples."""
    from merger.evaluation.plots import check_plot, plot_trials
    from merger.evaluation.search import search as find
    from merger.evaluation.tables import print_comparison

    check_plot(plot)
    with progress_bar(quiet) as (progress, notice):
        found = find(
            recipe,
            overrides,
            to=to,
            force=force,
            allow_calibration_text=allow_calibration_text,
            device=device,
            max_memory=memory_size(max_memory),
            offline=offline,
            trust_remote_code=trust_remote_code,
            progress=progress,
            notice=notice,
        )
    if plot is not None:
        series = {name or recipe.stem: [each.objective for each in trials] for name, trials in found.trials.items()}
        plot_trials(series, found.objective, plot)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    print_comparison(found.report, make_console(), settings=True)
    counted = sum(map(len, found.trials.values()))
    print(
        f"on examples that none of the {counted} trials has seen; the best by search data, "
        f"{found.objective} {found.winner.objective:.4f}, is {Path(found.folder) / 'best.yaml'}"
    )
