"""Keep the highest scores: the selection of TIES-Merging, https://arxiv.org/abs/2306.01708, with any score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._parameters import Order, Shares
from merger.methods._registry import Score, sparsifier
from merger.ops import Flow, RatioOf, Scope, keep, select

if TYPE_CHECKING:
    from torch import Tensor


@sparsifier()
def top(
    deltas: Tensor,
    scores: Tensor,
    *,
    density: Shares = 1,
    score: Score = "magnitude",
    scope: Scope = "tensor",
    exclusive: Order | None = None,
    ratio_of: RatioOf = "total",
    claim_zeros: bool = True,
) -> Flow[Tensor]:
    """Keeps the `density` of each task vector that scores highest, and sets the rest to zero.

    With `exclusive` every position goes to at most one expert: each chooses, in that order, among
    what the earlier ones left (OBIM's iterative merging, CABS's conflict awareness).
    At density 0.5, (4, -3, 1, 0) becomes (4, -3, 0, 0).
    """
    eligible = None if claim_zeros else deltas != 0
    kept = yield from select(scores, density, scope=scope, order=exclusive, eligible=eligible, ratio_of=ratio_of)
    return keep(deltas, kept)
