"""`merger verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from merger.cli._app import JUDGE, command
from merger.cli._options import AsJson, MaxMemory, Offline, Quiet, TrustRemoteCode, memory_size
from merger.cli._terminal import progress_bar, size_text
from merger.errors import VerifyError


@command(JUDGE)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint's folder.", show_default=False)],
    deep: Annotated[bool, typer.Option("--deep", help="Merge a sample of tensors again, and compare bits.")] = False,
    sample: Annotated[int, typer.Option(metavar="N", min=1, help="How many tensors --deep merges again.")] = 16,
    seed: Annotated[int, typer.Option(help="Chooses them.")] = 0,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="For --deep, where the folder was moved: its recipe.", show_default=False),
    ] = None,
    device: Annotated[str | None, typer.Option(help="For --deep; the recorded kind if not given.")] = None,
    max_memory: MaxMemory = None,
    offline: Offline = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check that a model is what it says: hashes, headers, values, config, tokenizer; with --deep, the merge itself."""
    from merger.outputs.verify import Deep
    from merger.outputs.verify import verify as check

    how = Deep(sample, seed, recipe, device, memory_size(max_memory), offline, trust_remote_code) if deep else None
    with progress_bar(quiet) as (progress, notice):
        found = check(folder, deep=how, progress=progress, notice=notice)
    if as_json:
        print(json.dumps(found.as_json()))
    if found.differences:
        raise VerifyError("\n".join(f"{folder}: {each}" for each in found.differences))
    if not as_json:
        whole = "is what merger.json says" if found.recorded else "agrees with itself; it has no merger.json"
        again = f"; {len(found.recomputed)} tensors merged again are the same bits" if deep else ""
        print(f"{folder}: {whole}: {found.tensors} tensors, {size_text(found.bytes)}{again}")
