"""Average by how much each weight matters to each expert. Fisher merging, https://arxiv.org/abs/2111.09832.

See docs/methods/weighting.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from merger.methods.mean import positive_sum
from merger.ops.arithmetic import column, summed
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


def _check(*, weight: Sequence[Fraction], floor: Fraction, **_: object) -> None:
    positive_sum(weight)
    if min(weight) < 0:
        raise ValueError(f"a weight is {float(min(weight)):g}, but is a factor of squares and cannot be negative")
    if floor < 0:
        raise ValueError(f"floor is {float(floor):g}, but squares are never below 0")


@merger(exact=False, check=_check)
def fisher(
    deltas: Tensor,
    fisher: Tensor | None,
    *,
    normalize: bool = True,
    scope: Whole = "global",
    floor: Number = 0,
    weight: Numbers = 1,
    lambda_: Number = 1,
) -> Flow[Tensor]:
    """Averages the task vectors with each element's Fisher information of each expert for weights.

    F_k [k r c] is the mean square of the gradient of log p(y | x) on the expert's text, y drawn from the expert's own
    predictions. With `normalize` each expert's is divided by its norm over `scope`. It is multiplied by the expert's
    `weight`. Where the sum of these is no more than `floor`, and where there is no Fisher information, it is the mean
    by `weight`. Needs calibration text and backward passes. Without `normalize` F of (3, 1) and (1, 1) makes
    (2.5, -3.5) of (4, -3) and (-2, -4).
    """
    importance = (deltas.new_zeros(deltas.shape) if fisher is None else fisher).double()
    shares = importance * column(weight, importance)
    if normalize:
        norms = (yield Sum(importance.square().sum((1, 2)), scope)).sqrt().to(importance.device)
        shares /= norms.where(norms > 0, 1).view(-1, 1, 1)
    total = summed(shares)
    even = column([w / sum(weight) for w in weight], shares)
    shares = (shares / total.where(total > 0, 1)).where(total > float(floor), even)
    merged = deltas[0] + summed((deltas - deltas[0]) * shares.to(deltas))
    return merged * float(lambda_)
