"""`merger inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from merger.cli._options import AsJson, Device, MaxMemory, Offline, Overrides, Quiet, TrustRemoteCode, load, memory_size
from merger.cli._terminal import make_console, progress_bar, size_text
from merger.errors import RecipeError


def inspect(
    what: Annotated[
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
    every: Annotated[bool, typer.Option("--all", help="Show every layer, not only the first dozen.")] = False,
    inputs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the relative paths of a finished merge start.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    device: Device = "auto",
    max_memory: MaxMemory = None,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what a merge would do, or what it did: density, overlap, conflict and balance, by layer and stage."""
    from merger import inspection
    from merger.checkpoint.files import check_replaceable, replace_bytes
    from merger.inspection import conditions, plots, tables
    from merger.inspection import html as page

    wanted = [conditions.parse(text) for text in fail_if]
    if overrides and (base is not None or what.is_dir()):
        raise RecipeError(f"--set changes a recipe, and {what} is none")
    if html is not None:
        check_replaceable(html, f"--html {html}")
    if plot is not None:
        plots.check(plot)
    looks = {
        "picture": tensor,
        "rank": rank or any(condition.metric == "effective_rank" for condition in wanted),
        "curves": curves or html is not None or plot is not None,
    }
    size = memory_size(max_memory)
    with progress_bar(quiet) as (progress, notice):
        common: dict[str, Any] = {**looks, "max_memory": size, "progress": progress, "notice": notice}
        if base is not None:
            seen = inspection.inspect_model(str(what), base, offline=offline, **common)
        elif what.is_dir():
            seen = inspection.inspect_merge(what, inputs=inputs, **common)
        else:
            loaded = load(what, overrides)
            common |= {"offline": offline, "device": device, "trust_remote_code": trust_remote_code}
            seen = inspection.inspect(loaded, **common)
    if html is not None:
        replace_bytes(html, page.page(seen).encode())
    if plot is not None:
        plots.write(seen, plot)
    if as_json:
        print(json.dumps(seen.as_json()))
    else:
        tables.print_inspection(seen, make_console(), every=every)
        read, peak = size_text(seen.bytes_read), size_text(seen.peak_memory_bytes)
        print(f"read {read} in {seen.seconds:.1f} s, peak memory {peak}")
    conditions.check(wanted, seen)
