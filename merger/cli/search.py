"""`merger search`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import MERGE, command
from merger.cli._options import RUN_FLAGS, AsJson, Overrides, RecipePath, RunFlags, run_flags
from merger.cli._terminal import make_console
from merger.cli.evaluate import AllowCalibrationText
from merger.display.terminal import print_text


@command(MERGE)
@run_flags(*RUN_FLAGS)
def search(
    recipe: RecipePath,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Record, best recipe and report; RECIPE.search if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start over where another search is on record.")] = False,
    allow_calibration_text: AllowCalibrationText = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the same as one page for a browser.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the objective over the trials; all formats but .svg need matplotlib."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Find the values that a recipe leaves open with {search: ...}, by merges in memory judged on held-out examples."""
    from merger.checkpoint.files import check_replaceable, replace_bytes
    from merger.evaluation.pages import search_page
    from merger.evaluation.plots import check_plot, plot_trials
    from merger.evaluation.search import search as find
    from merger.evaluation.tables import print_comparison

    check_plot(plot)
    if html is not None:
        check_replaceable(html, f"--html {html}")
    with flags.options() as options:
        result = find(
            recipe,
            overrides,
            options,
            to=to,
            force=force,
            allow_calibration_text=allow_calibration_text,
        )
    if html is not None:
        replace_bytes(html, search_page(result, recipe.stem).encode())
    if plot is not None:
        series = {name or recipe.stem: [trial.objective for trial in trials] for name, trials in result.trials.items()}
        plot_trials(series, result.objective, plot)
    if as_json:
        print(json.dumps(result.as_json()))
        return
    console = make_console()
    print_comparison(result.report, console, settings=True)
    count = sum(map(len, result.trials.values()))
    print_text(
        f"on examples that none of the {count} trials has seen; the best by search data, "
        f"{result.objective} {result.objective_text(result.winner)}, is {Path(result.folder) / 'best.yaml'}",
        console,
    )
