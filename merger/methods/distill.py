"""Learn each block's weights from the experts' outputs of that block; docs/methods/regression.md.

As progressive distillation, https://arxiv.org/abs/2502.12706, goes from block to block, but of the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from merger.methods._spectral import has_matrix
from merger.ops.questions import Flow
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import Anchor, Stage, merger

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

Steps = Annotated[int, Field(ge=1, le=100_000)]


def _anchor_alone(kind: str, *, anchor: Stage, **_: Any) -> list[Stage] | None:
    return None if has_matrix(kind) else [anchor]


def _check(*, rate: Fraction, weight: list[Fraction], **_: Any) -> None:
    if rate <= 0:
        raise ValueError(f"rate is {float(rate):g}, but steps of no length learn nothing")
    if min(weight) < 0 or not any(weight):
        raise ValueError("weight: an expert cannot count less than nothing, nor all of them nothing")


@merger(exact=False, check=_check, elsewhere=_anchor_alone)
def distill(
    deltas: Tensor,
    base: Tensor,
    inside: Callable[[Tensor], Flow[Tensor]],
    learned: Tensor | None,
    *,
    steps: Steps = 30,
    rate: Number = 5e-5,
    anchor: Anchor = "wudi_svc",
    weight: Numbers = 1,
) -> Flow[Tensor]:
    """Takes some steps of gradient descent from another method's result towards the experts' outputs, block by block.

    From `anchor` on, `steps` steps of Adam at `rate` change the matrices of a block so that its output, behind the
    merged blocks, comes closer to each expert's own on the expert's text: the squared distance as a share of the
    square, times `weight`, summed over the experts. What is no matrix of a block is the anchor's. Needs calibration
    text, and memory for a block's gradients.
    """
    if learned is None:
        return (yield from inside(deltas))
    return learned.to(base) - base
