"""Whether the keys of a recipe that are about its vocabulary agree with each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from merger.recipe.document import KeyPath
from merger.recipe.sections import UNION

if TYPE_CHECKING:
    from merger.recipe.recipe import Recipe


def vocabulary_faults(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """The faults of the recipe's tokenizer and rows of tokens that need no model to be seen, with their keys."""
    path: KeyPath = ("output", "tokenizer") if recipe.tokenizer is None else ("tokenizer",)
    name = recipe.named_tokenizer
    if None not in (recipe.tokenizer, recipe.output.tokenizer):
        yield (
            ("output", "tokenizer"),
            "is the older place of `tokenizer`, which is there too; leave it out",
        )
    if name == UNION and UNION in recipe.experts:
        yield path, "means the tokens of all models; give the expert `union` another name"
    if name == UNION and recipe.extra_rows == "drop":
        yield ("extra_rows",), "drop leaves out tokens that not all models have, which `tokenizer: union` keeps"
    if recipe.tokens and name is None:
        yield ("tokens",), "needs a tokenizer that has these tokens; add `tokenizer: base`, an expert or `union`"
