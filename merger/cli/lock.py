"""`merger lock`."""

from __future__ import annotations

import json

from merger.cli._app import MERGE, command
from merger.cli._options import AsJson, Overrides, RecipePath, RunFlags, load, run_flags


@command(MERGE)
@run_flags("device", "offline", "trust_remote_code")
def lock(recipe: RecipePath, flags: RunFlags = RunFlags(), overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Write down what a recipe comes to today, in recipe.lock beside it, for `merger run --locked`."""
    from merger.outputs.lock import lock as write
    from merger.outputs.lock import lock_of

    with flags.options() as options:
        content = write(load(recipe, overrides), lock_of(recipe), options)
    if as_json:
        print(json.dumps(content))
    else:
        print(f"{lock_of(recipe)}: {len(content['inputs'])} inputs, {len(content['files'])} files beside the weights")
