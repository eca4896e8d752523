"""Keep the middle. Model Breadcrumbs, https://arxiv.org/abs/2312.06795, section 3."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.arithmetic import count, keep
from merger.ops.questions import Flow, Scope, Size
from merger.ops.selection import exclusive as disjoint
from merger.ops.selection import select
from merger.pipeline.parameters import Order, Shares
from merger.pipeline.registry import Score, sparsifier

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
    size = scores.shape[-1] if scope == "row" else (yield Size(scope))
    low_density = [1 - Fraction(count(low, size), size) for low in drop_low]  # drop floor(drop_low * size)
    masks = yield from select(torch.cat([scores, scores]), [*low_density, *drop_high], scope=scope)
    mask, outliers = masks[: len(deltas)], masks[len(deltas) :]
    mask = mask & ~outliers
    return keep(deltas, mask if exclusive is None else disjoint(mask, exclusive))
