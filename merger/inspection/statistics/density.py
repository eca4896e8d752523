"""Density: how much of a model a vector changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.inspection.counters.merged import MergedCounter, MergedSums
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_EXPERT, NUMBER, share, statistic

if TYPE_CHECKING:
    from torch import Tensor


@statistic(form=BY_EXPERT, unit="share", formula="|A| / n", counters=[VectorCounter], order=50, in_layers=True)
def density(vectors: VectorSums) -> Tensor:
    """Share of all n positions that are an expert's: where its task vector is not zero."""
    return share(torch.tensor(vectors.joint).diagonal(), vectors.elements)


@statistic(
    name="density",
    subject="merged",
    form=NUMBER,
    unit="share",
    formula="|M| / n",
    counters=[MergedCounter],
    order=60,
    row="the merged vector",
)
def merged_density(merged: MergedSums) -> float:
    """Share of positions where the merged vector is not zero."""
    return merged.positions / max(merged.elements, 1)
