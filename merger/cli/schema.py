"""`merger schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from merger.cli._app import LEARN, command
from merger.errors import RecipeError


@command(LEARN)
def schema(
    of: Annotated[
        str, typer.Argument(metavar="[recipe|inspection|evaluation]", help="Of what.", show_default=False)
    ] = "recipe",
) -> None:
    """Print the JSON Schema of a recipe, for editors, or of what inspect and eval say in JSON, for machines."""
    from merger.errors import nearest

    if of == "inspection":
        from merger.inspection.report import json_schema
    elif of == "evaluation":
        from merger.evaluation.scores import json_schema
    elif of == "recipe":
        from merger.recipe.json_schema import json_schema
    else:
        raise RecipeError(f"there is no schema of {of!r}; {nearest(of, ('recipe', 'inspection', 'evaluation'))}")
    print(json.dumps(json_schema(), indent=2))
