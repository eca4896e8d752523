"""Low-rank task vectors around the mean. CART, https://arxiv.org/abs/2412.12153; docs/methods/spectral.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.methods._spectral import has_matrix, whole
from merger.methods.mean import mean, positive_sum
from merger.ops.arithmetic import count
from merger.ops.linalg import low_rank
from merger.pipeline.parameters import Number, Numbers, Share
from merger.pipeline.registry import Stage, merger, stage

if TYPE_CHECKING:
    from torch import Tensor


def _mean_alone(kind: str, *, head: bool, weight: Any, **_: object) -> list[Stage] | None:
    return None if has_matrix(kind, head=head) else [stage(mean, weight=weight)]


@merger(exact=False, takes=whole, check=positive_sum, elsewhere=_mean_alone)
def cart(
    deltas: Tensor,
    *,
    rank_share: Share = 0.08,
    weight: Numbers = 1,
    lambda_: Number = 1,
    head: bool = False,
) -> Tensor:
    """The mean of the models, plus `lambda` times the strongest directions in which each differs from it.

    An expert's directions are the `rank_share` of min(rows, columns), at least one. All of them, or
    none, add up to nothing. The base is not looked at, and a `lambda` of 0 is the mean, as for what is
    no matrix (and the head, unless `head`).
    """
    centre, full = mean(deltas, weight=weight), min(deltas.shape[1:])
    rank = max(1, count(rank_share, full))
    if rank == full or len(deltas) == 1:
        return centre
    shares = [float(w * len(deltas) / sum(weight)) for w in weight]
    difference = torch.zeros_like(centre, dtype=torch.float64)
    for delta, share in zip(deltas, shares, strict=True):
        difference += low_rank(delta.double() - centre, rank) * share
    return (centre + difference * float(lambda_)).to(deltas)
