"""The entries of `layers`: ranges of the models' blocks that make blocks of the output."""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from merger.pipeline.parameters import Numbers, at_depth
from merger.recipe.sections import Choice, regular_expression


def _block_range(value: Any) -> Any:
    """A pair of block numbers, unchanged; ValueError with an example for anything else."""
    numbers = value if isinstance(value, list) and len(value) == 2 else []
    if not numbers or not all(type(number) is int for number in numbers) or not 0 <= numbers[0] < numbers[1]:
        raise ValueError(f"is {value!r}, expected the first block and the one after the last, as in [0, 24]")
    return value


def _scale(value: Any) -> Any:
    """A scale, unchanged; ValueError for a map with a key that is not a regular expression."""
    for pattern in value if isinstance(value, Mapping) else ():
        regular_expression(str(pattern))
    return value


def _form(value: Any) -> str:
    return "by_model" if isinstance(value, Mapping) else "one"


BlockRange = Annotated[
    list[int],
    BeforeValidator(_block_range),
    Field(min_length=2, max_length=2, json_schema_extra={"items": {"type": "integer", "minimum": 0}}),
]
_Ranges = Annotated[
    Annotated[BlockRange, Tag("one")] | Annotated[dict[str, BlockRange], Field(min_length=1), Tag("by_model")],
    Discriminator(_form),
]


class Layer(Choice):
    """Blocks of the output: a copy of blocks of one model, or blocks of several models, merged."""

    model: str | None = Field(
        default=None, description="`base` or an expert, whose blocks are copied; left out, blocks are merged."
    )
    range: _Ranges = Field(
        description="The first block and the one after the last, as in [8, 32]; by model where their blocks differ."
    )
    scale: Annotated[Numbers, AfterValidator(_scale)] = Field(
        default=Fraction(1),
        description="A factor of the copied tensors: a number, or numbers by regular expression of the tensor's name.",
    )

    @property
    def use(self) -> str | None:
        """The model whose tensors are copied; None where tensors are merged."""
        return self.model

    @property
    def has_method(self) -> bool:
        """Whether the entry has a method of its own, and does not take the recipe's."""
        return self.method is not None or self.pipeline is not None

    def ranges(self, models: Iterable[str]) -> dict[str, builtins.range]:
        """The numbers of the blocks by model: of the copied model, of the models named, or of all ``models``."""
        if isinstance(self.range, Mapping):
            return {label: builtins.range(*self.range[label]) for label in models if label in self.range}
        labels = models if self.model is None else (self.model,)
        return {label: builtins.range(*self.range) for label in labels}

    def scale_of(self, tensor: str, depth: Fraction) -> Fraction:
        """The factor of a copied tensor at a depth between the entry's first block and its last."""
        if not isinstance(self.scale, Mapping):
            return at_depth(self.scale, depth)
        scales = (value for pattern, value in self.scale.items() if re.search(pattern, tensor))
        return at_depth(next(scales, Fraction(1)), depth)
