"""Overlap against CABS's target: the least overlap that the experts' densities allow.

CABS (https://arxiv.org/abs/2503.01874) prunes experts to n of m positions so that two of them overlap by
max(0, 2n - m) / n, which is the least possible. Two densities a and b allow max(0, a + b - 1) / a.
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
    formula="(|A ∩ B| - max(0, |A| + |B| - n)) / |A|",
    counters=[VectorCounter],
    order=29,
    symmetric=False,
    label="excess",
)
def overlap_excess(vectors: VectorSums) -> Tensor:
    """Overlap above CABS's target, the least that the densities allow; masks that avoid each other have 0."""
    joint = torch.tensor(vectors.joint)
    sizes = joint.diagonal()
    target = (sizes.view(-1, 1) + sizes - vectors.elements).clamp(min=0)
    return share(joint - target, sizes.view(-1, 1))
