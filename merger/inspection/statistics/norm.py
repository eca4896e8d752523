"""Norm: how far a vector moves the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.inspection.counters.merged import MergedCounter, MergedSums
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_EXPERT, NUMBER, floats, statistic

if TYPE_CHECKING:
    from torch import Tensor


@statistic(form=BY_EXPERT, unit="length", formula="‖δ‖", counters=[VectorCounter], order=30, in_layers=True)
def norm(vectors: VectorSums) -> Tensor:
    """Euclidean length of an expert's task vector."""
    return floats(vectors.products).diagonal().sqrt()


@statistic(
    name="norm",
    subject="merged",
    form=NUMBER,
    unit="length",
    formula="‖M‖",
    counters=[MergedCounter],
    order=70,
    row="the merged vector",
)
def merged_norm(merged: MergedSums) -> float:
    """Euclidean length of the merged vector."""
    return float(merged.square**0.5)
