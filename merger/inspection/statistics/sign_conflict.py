"""Sign conflict: where two experts pull a weight in opposite directions (TIES, https://arxiv.org/abs/2306.01708)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_PAIR, share, statistic

if TYPE_CHECKING:
    from torch import Tensor


@statistic(
    form=BY_PAIR,
    unit="share",
    formula="|{A ∩ B: sign(δ_A) ≠ sign(δ_B)}| / |A ∩ B|",
    counters=[VectorCounter],
    order=20,
    in_layers=True,
    label="conflict",
)
def sign_conflict(vectors: VectorSums) -> Tensor:
    """Of the positions of both experts, the share where their signs differ."""
    return share(torch.tensor(vectors.conflicts), torch.tensor(vectors.joint))
