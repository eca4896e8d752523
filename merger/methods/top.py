"""Keep the highest scores: the selection of TIES-Merging, https://arxiv.org/abs/2306.01708, with any score."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from merger.methods._claims import claims, remark_on_zeros
from merger.ops.arithmetic import RatioOf, keep
from merger.ops.questions import Flow, Scope, Size
from merger.ops.selection import select
from merger.pipeline.parameters import Order, Shares
from merger.pipeline.registry import Score, sparsifier

if TYPE_CHECKING:
    from torch import Tensor


def _claims(
    density: Sequence[Fraction], exclusive: Sequence[int] | None, claim_zeros: bool, ratio_of: RatioOf, **_: Any
) -> Sequence[Fraction]:
    return claims(density, exclusive, claim_zeros, ratio_of)


def _remark(experts: int, **parameters: Any) -> str:
    return remark_on_zeros(_claims(**parameters))


@sparsifier(claims=_claims, remark=_remark)
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
    at_least: Annotated[int, Field(ge=0)] = 0,
) -> Flow[Tensor]:
    """Keeps the `density` of each task vector that scores highest, and sets the rest to zero.

    With `exclusive` every position goes to at most one expert: each chooses, in that order, among
    what the earlier ones left (OBIM's iterative merging, CABS's conflict awareness). Where a density
    above 0 comes to fewer than `at_least` elements of the tensor, or row, so many are kept.
    At density 0.5, (4, -3, 1, 0) becomes (4, -3, 0, 0).
    """
    if at_least:
        size = scores.shape[-1] if scope == "row" else (yield Size(scope))
        density = [max(share, Fraction(min(at_least, size), size)) if share else share for share in density]
    eligible = None if claim_zeros else deltas != 0
    mask = yield from select(scores, density, scope=scope, order=exclusive, eligible=eligible, ratio_of=ratio_of)
    return keep(deltas, mask)
