"""Task vectors weighted by how certain each expert is. Gradient matching, https://arxiv.org/abs/2310.12808, section 3.

See docs/methods/weighting.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.ops.arithmetic import column, summed
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.parameters import Number, NumberOrAuto, Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


def _check(*, weight: Sequence[Fraction], size: Sequence[Fraction], prior: Any, **_: object) -> None:
    for name, values in (("weight", weight), ("size", size), ("prior", [] if prior == "auto" else [prior])):
        if min(values, default=0) < 0:
            raise ValueError(f"{name}: {float(min(values)):g} is negative, but curvature is not")


@merger(exact=False, check=_check)
def ugm(
    deltas: Tensor,
    fisher: Tensor | None,
    *,
    prior: NumberOrAuto = "auto",
    scope: Whole = "global",
    size: Numbers = 1,
    weight: Numbers = 1,
    lambda_: Number = 1,
) -> Flow[Tensor]:
    """Adds the task vectors, each element of them times its expert's curvature as a share of that of all.

    The curvature of expert k is H_k = `size` F_k, the diagonal Fisher information times how many samples it was trained
    on, and that of the base the `prior` H_0, by default the mean of all H_k over the `scope`. An element counts
    `weight` (H_0 + H_k) / (H_0 + sum of `weight` H_k) times, and `weight` times where all of it is 0. Needs calibration
    text and backward passes. With H_0 = 1, H of (3, 0) and (0, 0) makes (4, -7) of (4, -3) and (0, -4).
    """
    curvature = (deltas.new_zeros(deltas.shape) if fisher is None else fisher).double() * column(size, deltas.double())
    if prior == "auto":
        sums = torch.stack([curvature.sum(), curvature.new_tensor(0.0 if fisher is None else curvature.numel())])
        total, count = yield Sum(sums, scope)
        start = (total / count.clamp(min=1)).to(curvature.device)
    else:
        start = curvature.new_tensor(float(prior))
    weights = column(weight, curvature)
    total = start + summed(curvature * weights)
    shares = torch.where(total > 0, (start + curvature) / total.where(total > 0, 1), 1) * weights
    return summed(deltas * shares.to(deltas)) * float(lambda_)
