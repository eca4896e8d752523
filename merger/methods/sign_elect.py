"""Settle conflicts by electing a sign. TIES-Merging, https://arxiv.org/abs/2306.01708, sections 3.2 and 3.3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from merger.ops.arithmetic import column, mean_of_agreeing, summed, weighted_sum
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger()
def sign_elect(
    deltas: Tensor,
    *,
    weight: Numbers = 1,
    merge: Literal["mean", "sum", "max"] = "mean",
    zero_sign: Literal["zero", "majority", "positive"] = "zero",
    scope: Whole = "tensor",
) -> Flow[Tensor]:
    """Elects the sign of the weighted sum at each position and merges only the experts that agree with it.

    Where the sum is exactly 0 nobody agrees; `zero_sign` may elect + or the majority of all elected
    signs (over `scope`) instead. (4, -3), (-2, -4) and (1, 2) make (2.5, -3.5).
    """
    elected = weighted_sum(deltas, weight)
    weights = column(weight, deltas)
    if zero_sign == "majority":
        majority = (yield Sum(elected.sign().double().sum(), scope)).sign().to(elected)
        elected = elected.where(elected != 0, majority)
    elif zero_sign == "positive":
        elected = elected.where(elected != 0, 1)
    if merge == "mean":
        return mean_of_agreeing(deltas, elected, weights)
    agree = (deltas.sign() * elected.sign()).clamp_(min=0)
    return elected.sign() * (deltas.abs() * agree).amax(0) if merge == "max" else summed(deltas * (weights * agree))
