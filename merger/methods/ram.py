"""Average what experts share, keep what is one's own. Reinforced Agent Merging, https://arxiv.org/abs/2601.13572."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.arithmetic import keep, summed
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.parameters import Number
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger()
def ram(
    deltas: Tensor,
    *,
    epsilon: Number = 0.00001,
    r: Number = 0,
    alpha: Number = 0.2,
    scope: Whole = "tensor",
) -> Flow[Tensor]:
    """The mean at each position over the experts that changed it by more than `epsilon`, untouched ones left out.

    An `r` above 0 (RAM+, where it is 0.1) scales what one expert alone changed by 1 + r * min(alpha, s),
    where s is how many positions it shares for each of its own. (4, -3, 0) and (2, 0, 0) make (3, -3, 0).
    """
    changed = deltas.abs() > float(epsilon)
    holders = summed(changed.view(torch.int8))
    changes = keep(deltas, changed)
    if r:
        single = holders == 1
        counts = yield Sum(torch.stack([changed.sum((1, 2)), (changed & single).sum((1, 2))]), scope)
        overlap = (counts[0] - counts[1]) / counts[1].clamp(min=1)
        boost = 1 + float(r) * overlap.double().clamp(max=float(alpha))
        changes = torch.where(single, changes * boost.to(changes).view(-1, 1, 1), changes)
    return summed(changes) / holders.clamp(min=1)
