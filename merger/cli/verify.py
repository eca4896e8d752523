"""`merger verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger._display import size_text
from merger.cli._app import JUDGE, command
from merger.cli._options import RUN_FLAGS, AsJson, RunFlags, run_flags
from merger.cli._terminal import make_console
from merger.display.terminal import print_text
from merger.errors import VerifyError


@command(JUDGE)
@run_flags(*RUN_FLAGS)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder.", show_default=False)],
    deep: Annotated[bool, typer.Option("--deep", help="Merge a sample of tensors again, and compare bits.")] = False,
    sample: Annotated[int, typer.Option(metavar="N", min=1, help="How many tensors --deep merges again.")] = 16,
    seed: Annotated[int, typer.Option(help="Chooses them.")] = 0,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="For --deep, where the folder was moved: its recipe.", show_default=False),
    ] = None,
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Check that a model is what it says: hashes, headers, values, config, tokenizer; with --deep, the merge itself."""
    from merger.outputs.verify import DeepCheck
    from merger.outputs.verify import verify as check

    sampled = DeepCheck(sample, seed, recipe) if deep else None
    with flags.options() as options:
        verification = check(folder, options, deep=sampled)
    if as_json:
        print(json.dumps(verification.as_json()))
    if verification.differences:
        raise VerifyError("\n".join(f"{folder}: {difference}" for difference in verification.differences))
    if not as_json:
        state = "is what merger.json says" if verification.recorded else "agrees with itself; it has no merger.json"
        recomputed = f"; {len(verification.recomputed)} tensors merged again are the same bits" if deep else ""
        size = size_text(verification.bytes)
        print_text(f"{folder}: {state}: {verification.tensors} tensors, {size}{recomputed}", make_console())
