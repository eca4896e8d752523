"""Average task vectors. Model soups, https://arxiv.org/abs/2203.05482, section 2."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from merger.ops.arithmetic import anchored_mean
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


def positive_sum(weight: Sequence[Fraction], **_: object) -> None:
    """Refuses weights that have no mean."""
    if abs(sum(weight, Fraction(0))) < Fraction(1, 10**8):
        raise ValueError("the weights sum to zero, so there is no mean")


@merger(check=positive_sum)
def mean(deltas: Tensor, *, weight: Numbers = 1) -> Tensor:
    """The weighted mean of the task vectors, anchored at the first so that equal ones come back bit for bit.

    (4, -3) and (-2, -4) make (1, -3.5).
    """
    return anchored_mean(deltas, weight)
