"""Selection: the top of a score, as a count and never as a threshold; exact at any scope, ties in flat order.

A selection is a flow of questions about all slices, so no method that keeps the largest of something needs a whole
tensor in memory.

Shapes: k experts, r rows, c columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops import kernels
from merger.ops.arithmetic import RatioOf, count
from merger.ops.questions import Flow, Scope, Size, Sum
from merger.ops.radix import top

if TYPE_CHECKING:
    from torch import Tensor


def select(
    scores: Tensor,
    density: Sequence[Fraction],
    *,
    scope: Scope = "tensor",
    order: Sequence[int] | None = None,
    eligible: Tensor | None = None,
    ratio_of: RatioOf = "total",
) -> Flow[Tensor]:
    """The mask of each expert's highest scores; equal scores go to the lower flat index.

    ``scores`` [k r c] rank by their size, compared as float32; ``density`` is the kept share of each
    expert, as a count that is rounded down. With an ``order`` each expert chooses only among
    positions that earlier ones left free, so the masks are disjoint. ``eligible`` [k r c] bars
    positions from the start. Returns bool [k r c].
    """
    take = partial(_take, scores, density, scope, ratio_of)
    return (yield from (take(slice(None), eligible) if order is None else in_turn(order, eligible, take)))


def in_turn(
    order: Sequence[int], eligible: Tensor | None, take: Callable[[slice, Tensor | None], Flow[Tensor]]
) -> Flow[Tensor]:
    """The masks [k r c] of experts that choose one after the other.

    ``take(expert, free)`` chooses for one expert among the free positions; None stands for all of them.
    """
    masks: dict[int, Tensor] = {}
    claimed: Tensor | None = None
    for k in order:
        expert = slice(k, k + 1)
        free = None if eligible is None else eligible[expert]
        if claimed is not None:
            free = (~claimed)[None] if free is None else free & ~claimed
        (masks[k],) = yield from take(expert, free)
        claimed = masks[k] if claimed is None else claimed | masks[k]
    return torch.stack([masks[k] for k in range(len(masks))])


def _take(
    scores: Tensor, density: Sequence[Fraction], scope: Scope, ratio_of: RatioOf, experts: slice, free: Tensor | None
) -> Flow[Tensor]:
    """The top ``density`` of some experts' ``scores`` among their ``free`` positions."""
    scores, density = scores[experts], density[experts]
    if scope == "row":
        return _take_by_row(scores, density, ratio_of, free)
    if ratio_of == "remaining" and free is not None:
        sizes = (yield Sum(partial(_true_counts, free), scope)).tolist()
    else:
        sizes = [(yield Size(scope))] * len(density)
    counts = [count(share, size) for share, size in zip(density, sizes, strict=True)]
    return (yield from top(scores, free, counts, scope))


def _take_by_row(scores: Tensor, density: Sequence[Fraction], ratio_of: RatioOf, free: Tensor | None) -> Tensor:
    """The top ``density`` of every row."""
    free = torch.ones_like(scores, dtype=torch.bool) if free is None else free
    sizes = free.sum(-1) if ratio_of == "remaining" else torch.full(scores.shape[:2], scores.shape[-1])
    pairs = zip(density, sizes.tolist(), strict=True)
    counts = torch.tensor([[count(share, size) for size in rows] for share, rows in pairs])
    return top_of_rows(scores, counts.to(scores.device), free)


def _true_counts(masks: Tensor) -> Tensor:
    """The number of true elements of each expert's mask: [k]."""
    if masks.device.type != "cpu":
        return masks.flatten(1).sum(1)
    import numpy

    return torch.tensor([numpy.count_nonzero(mask) for mask in masks.numpy()])


# --- rows, blocks, and masks of all experts -------------------------------------------------------


def top_of_rows(scores: Tensor, counts: Tensor, free: Tensor) -> Tensor:
    """The mask of each row's ``counts`` [k r] highest free scores (all free ones where there are fewer).

    ``scores`` [k r c] is non-negative; equal scores go to the lower column. Returns bool [k r c].
    """
    return kernels.of(scores.float()).top_of_rows(scores, counts, free)


def ranks_of_rows(scores: Tensor) -> Tensor:
    """Each element's place in its row, 0 for the highest score; equal scores rank by column. [k r c]"""
    return kernels.of(scores.float()).ranks_of_rows(scores)


def exclusive(masks: Tensor, order: Sequence[int]) -> Tensor:
    """The masks [k r c] with every position held by the first expert in ``order`` alone."""
    disjoint: dict[int, Tensor] = {}
    claimed: Tensor | None = None
    for k in order:
        disjoint[k] = masks[k] if claimed is None else masks[k] & ~claimed
        claimed = masks[k] if claimed is None else claimed | masks[k]
    return torch.stack([disjoint[k] for k in range(len(masks))])


def top_of_blocks(scores: Tensor, n: int, m: int, free: Tensor | None, tail: int) -> Tensor:
    """The ``n`` highest free scores of every ``m`` consecutive elements of the flat slice (n:m).

    A last block that is shorter keeps ``tail``. A slice begins at a block's first element.
    """
    return kernels.of(scores.float()).top_of_blocks(scores, n, m, free, tail)
