"""One expert after another, each beside the others. OPCM, https://arxiv.org/abs/2501.09522.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from merger.methods._spectral import has_matrix, weighted, whole
from merger.methods.norm_sum import at_mean_norm, norm_sum
from merger.ops.linalg import svd
from merger.ops.questions import Flow, Whole
from merger.pipeline.parameters import Numbers, Order, Share
from merger.pipeline.registry import Stage, merger, stage

if TYPE_CHECKING:
    from torch import Tensor


def _added(kind: str, *, head: bool, weight: Any, scope: str, **_: object) -> list[Stage] | None:
    return None if has_matrix(kind, head=head) else [stage(norm_sum, weight=weight, scope=scope)]


@merger(exact=False, takes=whole, elsewhere=_added)
def opcm(
    deltas: Tensor,
    *,
    alpha: Share = 0.5,
    order: Order = "listed",
    weight: Numbers = 1,
    scope: Whole = "global",
    head: bool = False,
) -> Flow[Tensor]:
    """Adds to the task vectors so far what each next one has outside their strongest directions.

    The strongest are those that hold more than the share `alpha` of the singular values' sum; along the
    others a task vector loses its own diagonal. Then the sum is scaled to the mean norm of the task
    vectors: the model's (which takes a second pass, and the decompositions again), or the tensor's.
    diag(4, 2) and then ((1, 1), (1, 1)) add up to ((4, 1), (1, 2)) before that.
    """
    terms = weighted(deltas, weight)
    total = terms[order[0]].clone()
    for k in order[1:]:
        total += _orthogonal_change(terms[k], total, alpha)
    return (yield from at_mean_norm(total, terms, scope)).to(deltas)


def _orthogonal_change(delta: Tensor, total: Tensor, alpha: Fraction) -> Tensor:
    """Removes the strongest directions of ``total`` from ``delta``, and its part along each single direction."""
    left_vectors, values, right_vectors = svd(total)
    sums = values.cumsum(0)
    strongest = 1 + int((sums <= float(alpha) * sums[-1:] * (1 + 1e-12)).sum())  # an exact hit is not more
    rotated = left_vectors.T @ delta @ right_vectors
    removed = rotated.diagonal().diag()
    removed[:strongest, :strongest] = rotated[:strongest, :strongest]
    return delta - left_vectors @ removed @ right_vectors.T
