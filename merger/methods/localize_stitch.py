"""Localize each expert's changes, then stitch them together. https://arxiv.org/abs/2408.13656, the dataless form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.questions import Flow, Scope
from merger.ops.selection import select
from merger.pipeline.parameters import Shares
from merger.pipeline.registry import Score, merger

if TYPE_CHECKING:
    from torch import Tensor


@merger()
def localize_stitch(
    deltas: Tensor,
    scores: Tensor,
    *,
    density: Shares = 0.05,
    score: Score = "magnitude",
    scope: Scope = "global",
) -> Flow[Tensor]:
    """Takes the highest `density` of each task vector, and the mean where several experts took a position.

    A position that nobody took stays at the base. At density 0.5, (4, -3, 1, 0) and (2, 1, 1, 8) make (3, -3, 0, 8).
    """
    masks = yield from select(scores, density, scope=scope)
    stitched, holders = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, mask in zip(deltas, masks, strict=True):  # a running mean, so that equal deltas come back bit for bit
        holders += mask
        stitched += (delta - stitched) * mask / holders.clamp(min=1)
    return stitched
