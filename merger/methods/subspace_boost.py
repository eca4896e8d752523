"""Raise what a sum of task vectors holds little of. Subspace Boosting, https://arxiv.org/abs/2506.16506.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._spectral import untouched, whole
from merger.ops.linalg import svd
from merger.pipeline.parameters import Share
from merger.pipeline.registry import filter_

if TYPE_CHECKING:
    from torch import Tensor


@filter_(exact=False, takes=whole, elsewhere=untouched)
def subspace_boost(deltas: Tensor, *, beta: Share = 0.01, head: bool = False) -> Tensor:
    """Raises the small singular values of the merged task vector to one of its large ones.

    Those that come after the first values that add up to the share `beta` of all are raised to the last of these: at 0
    all become as large as the largest, at 1 none is raised. Directions that the merged task vector does not have stay
    empty. What is no matrix (and the head, tied or not, without `head`) stays as it was merged.
    At 0.6, diag(5, 3, 1, 1) becomes diag(5, 3, 3, 3).
    """
    directions = svd(deltas)
    if not len(directions.values):
        return deltas
    sums = directions.values.cumsum(0)
    last = int((sums < float(beta) * sums[-1]).sum())
    raised = directions.values.clamp(min=float(directions.values[last]))
    return directions._replace(values=raised).product().to(deltas)
