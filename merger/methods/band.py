"""Keep the middle. Model Breadcrumbs, https://arxiv.org/abs/2312.06795, section 3."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from merger.methods._parameters import Order, Shares
from merger.methods._registry import Score, sparsifier
from merger.ops import Flow, Scope, keep, select
from merger.ops import exclusive as disjoint

if TYPE_CHECKING:
    from torch import Tensor


def _room(drop_low: Sequence[Fraction], drop_high: Sequence[Fraction], **_: object) -> None:
    for low, high in zip(drop_low, drop_high, strict=True):
        if low + high >= 1:
            raise ValueError(f"drop_low {float(low):g} and drop_high {float(high):g} leave nothing to keep")


@sparsifier(check=_room)
def band(
    deltas: Tensor,
    scores: Tensor,
    *,
    drop_low: Shares = 0.85,
    drop_high: Shares = 0.01,
    score: Score = "magnitude",
    scope: Scope = "tensor",
    exclusive: Order | None = None,
) -> Flow[Tensor]:
    """Drops the lowest `drop_low` and the highest `drop_high` of each task vector.

    With `exclusive` an expert keeps of its band what no earlier one holds.
    Of (4, -3, 1, 0, 2, -1, 5, -6) at 0.5 and 0.125 the elements 4, -3 and 5 stay.
    """
    rest = [1 - low for low in drop_low]
    kept = yield from select(scores, rest, scope=scope, round_up=True)  # d - floor(drop_low * d)
    outliers = yield from select(scores, drop_high, scope=scope)
    kept &= ~outliers
    return keep(deltas, kept if exclusive is None else disjoint(kept, exclusive))
