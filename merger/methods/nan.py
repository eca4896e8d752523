"""Weights from the inverse norm. NAN, https://arxiv.org/abs/2505.16148; docs/methods/weighting.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from merger._lazy import torch
from merger.ops.arithmetic import summed
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.parameters import Number
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False)
def nan(
    deltas: Tensor,
    base: Tensor,
    *,
    norm_of: Literal["delta", "weights"] = "delta",
    power: Number = 1,
    scope: Whole = "tensor",
) -> Flow[Tensor]:
    """Half the sum of K task vectors, each weighted by the inverse of its norm; equal norms weigh 1/2 each.

    An expert that changed nothing has no say. `norm_of: weights` takes the norms of the weights
    instead, which sibling fine-tunes hardly differ in. (3, 0) and (0, 6) weigh 2/3 and 1/3: (2, 2).
    """
    measured = deltas if norm_of == "delta" else deltas + base
    norms = (yield Sum(measured.double().square().sum((1, 2)), scope)).sqrt()
    inverse = torch.where(norms > 0, norms ** -float(power), 0)
    share = inverse / inverse.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return summed(deltas * (len(deltas) / 2 * share).to(deltas).view(-1, 1, 1))
