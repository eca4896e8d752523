"""Jaccard index of the positions of two experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_PAIR, share, statistic

if TYPE_CHECKING:
    from torch import Tensor


@statistic(form=BY_PAIR, unit="share", formula="|A ∩ B| / |A ∪ B|", counters=[VectorCounter], order=25)
def jaccard(vectors: VectorSums) -> Tensor:
    """Of the positions of either of two experts, the share that both have."""
    joint = torch.tensor(vectors.joint)
    sizes = joint.diagonal()
    return share(joint, sizes.view(-1, 1) + sizes - joint)
