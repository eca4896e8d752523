"""Calibration by itself: the statistics of a recipe's experts, kept for later merges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merger.calibration import statistics_files
from merger.calibration.provider import block_providers, model_providers
from merger.calibration.statistics import keep_grams
from merger.engine.prepare import prepare
from merger.errors import RecipeError
from merger.options import RunOptions
from merger.planning.plan import Plan
from merger.recipe.recipe import Recipe, as_recipe


def calibrate(
    recipe: Recipe | str | Path, options: RunOptions = RunOptions(), *, to: Path | None = None, gram: bool = False
) -> Mapping[str, Path]:
    """Makes the statistics of a recipe's experts, or finds those of an earlier run; copies them to the folder ``to``.

    ``recipe`` may be the path of its file. With ``gram`` they hold Gram matrices, are as large as the models, and are
    made in ``to`` itself, where an unfinished one is continued. Returns the file or folder of each expert, as
    ``calibration: {stats: ...}`` of a recipe takes them.
    """
    with prepare(as_recipe(recipe).as_model(), options) as prepared:
        if gram:
            _check_grams(prepared.plan)
            return keep_grams(prepared.plan, prepared.options, prepared.machine.hidden_memory, to)
        _check_statistics(prepared.plan)
        paths = prepared.inputs.files
    return paths if to is None else statistics_files.copy(paths, to)


def _check_statistics(plan: Plan) -> None:
    """RecipeError if the recipe needs no statistics that can be kept in a file."""
    if not model_providers(plan):
        raise RecipeError(
            "no stage of this recipe needs statistics that are kept: there is nothing to calibrate"
            + (" (gram=True keeps Gram matrices)" if block_providers(plan) else "")
        )


def _check_grams(plan: Plan) -> None:
    """RecipeError if the recipe needs no Gram matrices, or none that can be made before the merge."""
    if not block_providers(plan):
        raise RecipeError("no stage of this recipe takes Gram matrices: there is nothing to keep with gram=True")
    if any(stage_input.follows_merge for stage_input in plan.inputs):
        raise RecipeError(
            "Gram matrices of this recipe are made behind the merged blocks, during the merge: there is nothing to "
            "keep with gram=True"
        )
