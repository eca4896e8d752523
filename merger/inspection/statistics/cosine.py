"""Cosine: whether two vectors point the same way."""

from __future__ import annotations

import numpy

from merger.inspection.counters.merged import MergedCounter, MergedSums
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_EXPERT, BY_PAIR, Array, array, share, statistic


@statistic(form=BY_PAIR, unit="cosine", formula="⟨δ_A, δ_B⟩ / (‖δ_A‖ ‖δ_B‖)", counters=[VectorCounter], order=28)
def cosine(vectors: VectorSums) -> Array:
    """Cosine of the angle between the task vectors of two experts."""
    products = array(vectors.products)
    lengths = numpy.sqrt(products.diagonal())
    return share(products, lengths[:, None] * lengths)


@statistic(
    name="cosine",
    subject="merged",
    form=BY_EXPERT,
    unit="cosine",
    formula="⟨M, δ⟩ / (‖M‖ ‖δ‖)",
    counters=[MergedCounter, VectorCounter],
    order=40,
)
def merged_cosine(merged: MergedSums, vectors: VectorSums) -> Array:
    """Cosine of the angle between the merged vector and an expert's task vector."""
    squares = array(vectors.products).diagonal()
    return share(array(merged.products), merged.square**0.5 * numpy.sqrt(squares))
