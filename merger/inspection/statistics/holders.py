"""Holders: how many experts change a position."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import SERIES, Axis, share, statistic

if TYPE_CHECKING:
    from torch import Tensor


@statistic(
    form=SERIES,
    unit="share",
    formula="|{positions of exactly j experts}| / n, for j = 0, 1, .. k",
    counters=[VectorCounter],
    order=80,
    axis=Axis("experts", lambda experts: range(experts + 1)),
)
def holders(vectors: VectorSums) -> Tensor:
    """Share of positions that exactly 0, 1, 2, .. of the experts have."""
    return share(torch.tensor(vectors.holders), vectors.elements)
