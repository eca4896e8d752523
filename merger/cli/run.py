"""`merger run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    load,
    memory_size,
)
from merger.cli._terminal import progress_bar, size_text
from merger.errors import RecipeError

if TYPE_CHECKING:
    from merger.engine.loop import Progress
    from merger.recipe.recipe import Recipe


@command(MERGE)
def run(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 typer reads the default, nothing changes it
    device: Device = "auto",
    max_memory: MaxMemory = None,
    offline: Offline = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    locked: Annotated[bool, typer.Option("--locked", help="Refuse what differs from the recipe's lock.")] = False,
    trust_mtime: Annotated[
        bool,
        typer.Option("--trust-mtime", help="With --locked: take an output of the same size and time for unchanged."),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge: read the inputs, write one checkpoint that transformers loads."""
    from merger.engine.merge import merge

    if trust_mtime and not locked:
        raise RecipeError("--trust-mtime: is about what --locked would do; say both")
    loaded = load(recipe, overrides)
    with progress_bar(quiet) as (progress, notice):
        if locked and _is_done(loaded, recipe, offline, trust_mtime, progress):
            output = loaded.folder / loaded.output.path
            print(json.dumps({"output": str(output), "unchanged": True}) if as_json else f"{output}: {_UNCHANGED}")
            return
        result = merge(
            loaded,
            device=device,
            max_memory=memory_size(max_memory),
            offline=offline,
            force=force,
            trust_remote_code=trust_remote_code,
            progress=progress,
            notice=notice,
        )
    if as_json:
        print(json.dumps(result.as_json()))
        return
    counts = ", ".join(f"{count} {what}" for what, count in result.tensors.items() if count)
    read, written = size_text(result.bytes_read), size_text(result.bytes_written)
    print(
        f"{result.output}: {counts} tensors; read {read}, wrote {written} "
        f"in {result.seconds:.1f} s on {result.device}, peak memory {size_text(result.peak_memory_bytes)}"
    )


_UNCHANGED = "is what the lock says, and whole; nothing to do"


def _is_done(loaded: Recipe, path: Path, offline: bool, trust_mtime: bool, progress: Progress | None) -> bool:
    from merger.outputs.lock import check_lock, is_done, lock_of

    check_lock(loaded, lock_of(path), offline=offline)
    return is_done(loaded, lock_of(path), trust_mtime=trust_mtime, progress=progress)
