"""`merger run`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merger.cli._app import MERGE, command
from merger.cli._options import RUN_FLAGS, AsJson, Overrides, RecipePath, RunFlags, load, run_flags
from merger.cli._terminal import make_console, program_name
from merger.display.terminal import print_text
from merger.errors import RecipeError

if TYPE_CHECKING:
    from merger.engine.merge import Result
    from merger.options import RunOptions
    from merger.recipe.recipe import Recipe


@command(MERGE)
@run_flags(*RUN_FLAGS)
def run(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 typer reads the default, nothing changes it
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")] = False,
    locked: Annotated[bool, typer.Option("--locked", help="Refuse what differs from the recipe's lock.")] = False,
    trust_mtime: Annotated[
        bool,
        typer.Option("--trust-mtime", help="With --locked: take an output of the same size and time for unchanged."),
    ] = False,
    allow_versions: Annotated[
        str, typer.Option(metavar="NAME[,NAME...]", help="With --locked: let the versions of these packages differ.")
    ] = "",
    flags: RunFlags = RunFlags(),
    as_json: AsJson = False,
) -> None:
    """Merge: read the inputs, write one checkpoint that transformers loads."""
    from merger.engine.merge import merge

    if trust_mtime and not locked:
        raise RecipeError("--trust-mtime: is about what --locked would do; say both")
    packages = [name.strip() for name in allow_versions.split(",") if name.strip()]
    if packages and not locked:
        raise RecipeError("--allow-versions: is about what --locked would refuse; say both")
    loaded = load(recipe, overrides)
    with flags.options() as options:
        waived, unchanged = _compare(loaded, recipe, options, trust_mtime, packages) if locked else ([], False)
        result = None if unchanged else merge(loaded, options, force=force, remarks=waived)
    if result is None:
        output = loaded.folder / loaded.output.path
        print(json.dumps({"output": str(output), "unchanged": True}) if as_json else f"{output}: {_UNCHANGED}")
        return
    if as_json:
        print(json.dumps(result.as_json()))
        return
    console = make_console()
    print_text(result.summary, console)
    if not flags.quiet:
        sentence, command = _next_step(result, loaded, recipe)
        print_text(sentence, console, command=command)


def _compare(
    recipe: Recipe, path: Path, options: RunOptions, trust_mtime: bool, packages: Sequence[str]
) -> tuple[list[str], bool]:
    """The allowed differences from the recipe's lock, and whether the output is what the lock says, and whole."""
    from merger.outputs.lock import check_lock, is_done, lock_of

    lock = lock_of(path)
    waived = check_lock(recipe, lock, options, allow_versions=packages)
    return waived, is_done(recipe, lock, options, trust_mtime=trust_mtime, allow_versions=packages)


def _next_step(result: Result, recipe: Recipe, path: Path) -> tuple[str, str]:
    """The line after a merge: a sentence on what loads the output, and the command to type next."""
    output, program = result.output, program_name()
    if result.packed:
        name = result.packed[0]
        command = shlex.join(["extract", output, name, "-o", f"{output}-{name}"])
        experts = ", ".join(result.packed)
        sentence = f"it packs {experts}, which transformers does not load; write one that it does with:"
        return sentence, f"{program} {command}"
    if recipe.evaluation is None:
        question, command = "what each expert gave", shlex.join(["inspect", output])
    else:
        overrides = [argument for override in recipe.overrides for argument in ("--set", override)]
        question, command = "what it kept of each expert", shlex.join(["eval", str(path), *overrides])
    return f"transformers loads it as it is; see {question}:", f"{program} {command}"


_UNCHANGED = "is what the lock says, and whole; nothing to do"
