"""Whether the form of a recipe's output can hold what its methods make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from merger.recipe.calibration_faults import matrix_stages
from merger.recipe.document import KeyPath

if TYPE_CHECKING:
    from merger.recipe.recipe import Recipe


def output_faults(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """The faults of the output's form that need no model to be seen, with their keys."""
    if recipe.output.form == "model":
        if recipe.output.rank is not None:
            yield ("output", "rank"), "is that of an adapter; add `form: adapter`, or leave it out"
        return
    if recipe.base.adapter is not None:
        yield ("base", "adapter"), "an adapter is for a model alone; merge the base's adapter into it first"
    if recipe.output.pad_rows_to is not None:
        yield ("output", "pad_rows_to"), "an adapter keeps the rows of the base's vocabulary; leave it out"
    if recipe.layers:
        yield ("layers",), "an adapter keeps the blocks of the base; write `form: model`"
    for i, rule in enumerate(recipe.rules):
        if rule.use not in (None, "base"):
            yield ("rules", i, "use"), "an adapter holds changes and no copies; write `use: base`, or `form: model`"
    for place, choice in recipe.choices().items():
        bounds = matrix_stages(choice.stages, recipe.experts_of(choice))
        key: KeyPath = (*place, "pipeline" if choice.pipeline else "method")
        if any(bound.entry.packing is not None for bound in bounds):
            yield key, "makes more than one model, and an adapter holds one; write `form: model`"
        if any(source.follows_merge for bound in bounds for source in bound.inputs):
            yield (
                key,
                "looks behind merged blocks, which an adapter does not hold; write `form: model`, and make an adapter "
                "of the output with `merger lora`",
            )
