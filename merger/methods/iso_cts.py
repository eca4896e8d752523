"""Common and task-specific directions made equal. Iso-CTS, https://arxiv.org/abs/2502.04959, section 4.2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.methods._spectral import averaged, weighted, whole
from merger.methods.iso_c import iso_c
from merger.ops.arithmetic import count, summed
from merger.ops.linalg import decorrelated, side_by_side, svd, tolerance
from merger.pipeline.parameters import Number, Numbers, Share
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False, takes=whole, elsewhere=averaged)
def iso_cts(
    deltas: Tensor,
    *,
    common: Share = 0.8,
    weight: Numbers = 1,
    lambda_: Number = 1,
    head: bool = False,
) -> Tensor:
    """Gives one singular value to the strongest directions of the sum and to the strongest that each expert has beside.

    The sum has the `common` share of all directions, and each expert 1/K of the rest, rounded half to
    even; where that is none, it is `iso_c`. `lambda` is the paper's alpha. What is no matrix (and the
    head, unless `head`) gets the mean.
    """
    full, k = min(deltas.shape[1:]), len(deltas)
    expert_rank = min(round((full - count(common, full)) / k), full // k)  # directions of each expert
    if expert_rank == 0:
        return iso_c(deltas, weight=weight, lambda_=lambda_, head=head)
    terms = weighted(deltas, weight)
    common_directions = svd(summed(terms), rank=full - expert_rank * k)
    parts = [common_directions]
    for delta in terms:
        # what projecting leaves of a common direction is rounding, however large it is beside the rest
        rounding = tolerance(delta) * float(torch.linalg.matrix_norm(delta))
        span = common_directions.left
        parts.append(svd(delta - span @ (span.T @ delta), rank=expert_rank, rounding=rounding))
    directions = side_by_side(parts)
    flat = directions._replace(values=directions.values.mean().expand_as(directions.values))
    return (decorrelated(flat) * float(lambda_)).to(deltas)
