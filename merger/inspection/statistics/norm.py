"""Norm: how far a vector moves the base."""

from __future__ import annotations

import numpy

from merger.inspection.counters.merged import MergedCounter, MergedSums
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_EXPERT, NUMBER, Array, array, statistic


@statistic(form=BY_EXPERT, unit="length", formula="‖δ‖", counters=[VectorCounter], order=30, in_layers=True)
def norm(vectors: VectorSums) -> Array:
    """Euclidean length of an expert's task vector."""
    return numpy.sqrt(array(vectors.products).diagonal())


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
