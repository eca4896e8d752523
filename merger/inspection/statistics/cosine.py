"""Cosine: whether two vectors point the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.inspection.counters.merged import MergedCounter, MergedSums
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_EXPERT, BY_PAIR, floats, share, statistic

if TYPE_CHECKING:
    from torch import Tensor


@statistic(form=BY_PAIR, unit="cosine", formula="⟨δ_A, δ_B⟩ / (‖δ_A‖ ‖δ_B‖)", counters=[VectorCounter], order=28)
def cosine(vectors: VectorSums) -> Tensor:
    """Cosine of the angle between the task vectors of two experts."""
    products = floats(vectors.products)
    lengths = products.diagonal().sqrt()
    return share(products, lengths.view(-1, 1) * lengths)


@statistic(
    name="cosine",
    subject="merged",
    form=BY_EXPERT,
    unit="cosine",
    formula="⟨M, δ⟩ / (‖M‖ ‖δ‖)",
    counters=[MergedCounter, VectorCounter],
    order=40,
)
def merged_cosine(merged: MergedSums, vectors: VectorSums) -> Tensor:
    """Cosine of the angle between the merged vector and an expert's task vector."""
    squares = floats(vectors.products).diagonal()
    return share(floats(merged.products), merged.square**0.5 * squares.sqrt())
