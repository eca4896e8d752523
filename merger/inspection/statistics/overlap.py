"""Overlap rate: how much of what one expert changes another changes too.

CABS (https://arxiv.org/abs/2503.01874), appendix B.1.
"""

from __future__ import annotations

from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_PAIR, Array, array, share, statistic


@statistic(
    form=BY_PAIR,
    unit="share",
    formula="|A ∩ B| / |A|",
    counters=[VectorCounter],
    order=10,
    symmetric=False,
    in_layers=True,
)
def overlap(vectors: VectorSums) -> Array:
    """Share of the positions of expert A that expert B has too. Random masks have B's density."""
    joint = array(vectors.joint)
    return share(joint, joint.diagonal()[:, None])
