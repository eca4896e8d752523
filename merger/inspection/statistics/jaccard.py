"""Jaccard index of the positions of two experts."""

from __future__ import annotations

from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_PAIR, Array, array, share, statistic


@statistic(form=BY_PAIR, unit="share", formula="|A ∩ B| / |A ∪ B|", counters=[VectorCounter], order=25)
def jaccard(vectors: VectorSums) -> Array:
    """Of the positions of either of two experts, the share that both have."""
    joint = array(vectors.joint)
    sizes = joint.diagonal()
    return share(joint, sizes[:, None] + sizes - joint)
