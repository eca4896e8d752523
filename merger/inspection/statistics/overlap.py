"""Overlap rate: how much of what one expert changes another changes too.

CABS (https://arxiv.org/abs/2503.01874), appendix B.1.
"""

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
    formula="|A ∩ B| / |A|",
    counters=[VectorCounter],
    order=10,
    symmetric=False,
    in_layers=True,
)
def overlap(vectors: VectorSums) -> Tensor:
    """Share of the positions of expert A that expert B has too. Random masks have B's density."""
    joint = torch.tensor(vectors.joint)
    return share(joint, joint.diagonal().view(-1, 1))
