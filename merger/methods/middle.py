"""Keep the middle, counted by what is kept: Model Breadcrumbs, https://arxiv.org/abs/2312.06795, as mergekit has it.

`band` counts what is dropped at either end, each count rounded down, and keeps the rest.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from merger.ops.arithmetic import count, keep
from merger.ops.questions import Flow, Scope, Size
from merger.ops.selection import select
from merger.pipeline.parameters import Shares
from merger.pipeline.registry import Score, sparsifier

if TYPE_CHECKING:
    from torch import Tensor


@sparsifier()
def middle(
    deltas: Tensor,
    scores: Tensor,
    *,
    density: Shares = 0.9,
    drop_high: Shares = 0.01,
    score: Score = "magnitude",
    scope: Scope = "tensor",
) -> Flow[Tensor]:
    """Keeps the `density` of each task vector that comes after the highest `drop_high`.

    Where the two add up to more than all, fewer of the highest are dropped. Of (4, -3, 1, 0, 2, -1, 5, -6)
    at 0.375 and 0.125 the elements 4, -3 and 5 stay.
    """
    size = scores.shape[-1] if scope == "row" else (yield Size(scope))
    if not size:
        return deltas
    mask = [count(share, size) for share in density]
    outliers = [min(count(share, size), size - n) for share, n in zip(drop_high, mask, strict=True)]
    either = [Fraction(n + above, size) for n, above in zip(mask, outliers, strict=True)]
    upper = yield from select(scores, either, scope=scope)
    highest = yield from select(scores, [Fraction(n, size) for n in outliers], scope=scope)
    return keep(deltas, upper & ~highest)
