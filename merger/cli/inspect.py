"""`merger inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from merger._display import size_text
from merger.cli._app import JUDGE, command
from merger.cli._options import RUN_FLAGS, AsJson, Overrides, RunFlags, load, run_flags
from merger.cli._terminal import make_console
from merger.errors import RecipeError


@command(JUDGE)
@run_flags(*RUN_FLAGS)
def inspect(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="WHAT", help="A recipe, the folder of a finished merge, or with --base a model.", show_default=False
        ),
    ],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Say where the model WHAT differs from this one.")
    ] = None,
    fail_if: Annotated[
        list[str],
        typer.Option("--fail-if", metavar="CONDITION", help="Exit with 1 where it holds, as in 'overlap > 0.3'."),
    ] = [],  # noqa: B006
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the same as one page for a browser.")] = None,
    tensor: Annotated[
        str | None, typer.Option(metavar="NAME", help="Map in the page where this tensor keeps its weights.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the same as PNG and SVG, by matplotlib.")
    ] = None,
    curves: Annotated[
        bool, typer.Option("--curves", help="Overlap and balance against density; a page and plots have them anyway.")
    ] = False,
    rank: Annotated[
        bool, typer.Option("--rank", help="The effective rank of every matrix, which takes a while.")
    ] = False,
    subspaces: Annotated[
        bool,
        typer.Option(
            "--subspaces",
            help="How the singular directions of experts and merge interfere; decomposes every matrix of each.",
        ),
    ] = False,
    all_rows: Annotated[bool, typer.Option("--all", help="Show every layer, not only the first dozen.")] = False,
    inputs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the relative paths of a finished merge start.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Show what a merge would do, or what it did: density, overlap, conflict and balance, by layer and stage."""
    from merger import inspection
    from merger.checkpoint.files import check_replaceable, replace_bytes
    from merger.checkpoint.near_paths import missing_path
    from merger.inspection import conditions, console, plots
    from merger.inspection import html as page

    parsed = [conditions.parse(text) for text in fail_if]
    if overrides and (base is not None or model.is_dir()):
        raise RecipeError(f"--set changes a recipe, and {model} is none")
    if html is not None:
        check_replaceable(html, f"--html {html}")
    if plot is not None:
        plots.check(plot)
    requests = {request for condition in parsed for request in condition.requests}
    extras: dict[str, Any] = {
        "picture": tensor,
        "rank": rank or "rank" in requests,
        "subspaces": subspaces or "subspaces" in requests,
        "curves": curves or html is not None or plot is not None,
    }
    with flags.options() as options:
        if base is not None:
            result = inspection.inspect_model(str(model), base, options, **extras)
        elif not model.exists():
            raise RecipeError(missing_path(model, "recipe or folder", Path.exists))
        elif model.is_dir():
            result = inspection.inspect_merge(model, options, inputs=inputs, **extras)
        else:
            result = inspection.inspect(load(model, overrides), options, **extras)
    if html is not None:
        replace_bytes(html, page.page(result).encode())
    if plot is not None:
        plots.write(result, plot)
    if as_json:
        print(json.dumps(result.as_json()))
    else:
        console.print_inspection(result, make_console(), all_rows=all_rows)
        bytes_read, peak = size_text(result.bytes_read), size_text(result.peak_memory_bytes)
        print(f"read {bytes_read} in {result.seconds:.1f} s, peak memory {peak}")
    conditions.check(parsed, result)
