"""Learn each block's parameters from the experts' outputs of that block; docs/methods/regression.md.

As progressive distillation, https://arxiv.org/abs/2502.12706, goes from block to block, but of the weights themselves.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from merger.methods._spectral import has_matrix
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import Stage, filter_

if TYPE_CHECKING:
    from torch import Tensor

Steps = Annotated[int, Field(ge=1, le=100_000)]


def _nothing_elsewhere(kind: str, **_: Any) -> list[Stage] | None:
    return None if has_matrix(kind) or kind == "vector" else []


def check_steps(*, rate: Fraction, weight: list[Fraction], **_: Any) -> None:
    """Refuses steps that learn nothing."""
    if rate <= 0:
        raise ValueError(f"rate is {float(rate):g}, but steps of no length learn nothing")
    if min(weight) < 0 or not any(weight):
        raise ValueError("weight: an expert cannot count less than nothing, nor all of them nothing")


@filter_(exact=False, check=check_steps, elsewhere=_nothing_elsewhere)
def learn(
    deltas: Tensor,
    base: Tensor,
    learned: Tensor | None,
    *,
    steps: Steps = 30,
    rate: Number = 5e-5,
    weight: Numbers = 1,
) -> Tensor:
    """Takes some steps of gradient descent from what was merged towards the experts' outputs, block by block.

    `steps` steps of Adam at `rate` change the matrices, norms and biases of a block so that its output, behind the
    merged blocks, comes closer to each expert's own on the expert's text: the squared distance as a share of the
    square, times `weight`, summed over the experts. What is in no block stays as it was merged. Needs calibration
    text, and memory for a block's gradients.
    """
    return deltas if learned is None else learned.to(base) - base
