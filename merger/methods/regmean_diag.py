"""Weigh each input by how large it is for an expert. RegMean, https://arxiv.org/abs/2212.09849.

See docs/methods/regression.md.

RegMean's least squares with the Gram matrices' diagonals alone (its alpha at 0), which decouples the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from merger.methods.mean import mean, positive_sum
from merger.ops.arithmetic import column, summed
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


def a_share_each(weight: Sequence[Fraction], **_: object) -> None:
    """Refuses weights that cannot be those of squares."""
    positive_sum(weight)
    if min(weight) < 0:
        raise ValueError(f"a weight is {float(min(weight)):g}, but is a factor of E[x^2] and cannot be negative")


@merger(check=a_share_each)
def regmean_diag(
    deltas: Tensor,
    second_moment: Tensor | None,
    reached: Tensor | None,
    *,
    weight: Numbers = 1,
    lambda_: Number = 1,
) -> Tensor:
    """Averages each column of the task vectors with the weights E[x_j^2] of the experts' own inputs to it.

    A packed expert that no token reached has no say; columns that no token reached, and tensors
    without inputs of their own, get the plain mean. Needs calibration text.
    For E[x^2] of (3, 1) and (1, 1), the rows (4, -3) and (-2, -4) make (2.5, -3.5).
    """
    if second_moment is None or reached is None:
        return mean(deltas, weight=weight) * float(lambda_)
    importance = second_moment.double() * reached * column(weight, second_moment.double())
    total = summed(importance)
    even = column([w / sum(weight) for w in weight], importance)
    shares = (importance / total.where(total > 0, 1)).where(total > 0, even)
    difference = summed((deltas - deltas[0]) * shares.to(deltas))
    return (deltas[0] + difference) * float(lambda_)
