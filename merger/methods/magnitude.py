"""Magnitude: the size of a change is its worth. TIES-Merging, https://arxiv.org/abs/2306.01708, section 3.1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.pipeline.registry import score

if TYPE_CHECKING:
    from torch import Tensor


@score()
def magnitude(deltas: Tensor) -> Tensor:
    """|delta|: (4, -3, 1, 0) ranks as (4, 3, 1, 0), since a score ranks by its size."""
    return deltas
