"""Divide by the number of experts. Model soups, https://arxiv.org/abs/2203.05482, section 2."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from merger.methods.mean import mean
from merger.ops.arithmetic import column
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger()
def plain_mean(deltas: Tensor, *, weight: Numbers = 1) -> Tensor:
    """The mean of the task vectors, each times its `weight`, which is not divided out again as `mean` does.

    (4, -3) and (-2, -4) with weights 1 and 0.5 make (1.5, -2.5).
    """
    return mean(deltas * column(weight, deltas), weight=[Fraction(1)] * len(deltas))
