"""Thinning a matrix column by column, so that what stays makes up for what goes. https://arxiv.org/abs/2301.00774."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.methods._spectral import has_matrix
from merger.methods.top import top
from merger.ops.arithmetic import count, keep
from merger.ops.questions import Flow
from merger.ops.selection import select, top_of_rows
from merger.pipeline.registry import Stage, stage

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
"""Columns whose entries are ranked together, as in the paper."""
LEAST = 1e-6
"""Damping from which on H is positive definite in float64, whatever the inputs."""

ColumnScore = Callable[["Tensor", slice, "Tensor"], "Tensor"]
"""Scores [r b] of a block of columns: of what is left of the task vector there [r b], and (H^-1)_jj [b]."""


def by_magnitude(kind: str, *, density: Any, **_: object) -> list[Stage] | None:
    """Tensors without inputs of their own are thinned by magnitude."""
    return None if kind != "tied" and has_matrix(kind, head=True) else [stage(top, density=density)]


def check_damping(*, damping: Fraction, **_: object) -> None:
    """Refuses damping with which H may have no inverse."""
    if damping < LEAST:
        raise ValueError(f"damping: is {float(damping):g}, expected at least {LEAST:g}, so that H has an inverse")


def thinned(
    deltas: Tensor,
    gram: Tensor | None,
    score: ColumnScore,
    density: Sequence[Fraction],
    damping: Fraction,
    exclusive: Sequence[int] | None,
) -> Flow[Tensor]:
    """The task vectors [k r c], thinned by ``score``; by magnitude where the inputs have no Gram matrix [k c c]."""
    if gram is None:
        return keep(deltas, (yield from select(deltas.abs(), density, order=exclusive)))
    thin_deltas, free = torch.empty_like(deltas), torch.ones_like(deltas[0], dtype=torch.bool)
    for k in range(len(deltas)) if exclusive is None else exclusive:
        if gram[k].any():
            delta, expert_gram = (tensors[k].to(torch.float64, copy=True) for tensors in (deltas, gram))
            masks = _thin(delta, expert_gram, score, free, density[k], float(damping))
            thin_deltas[k] = delta
        else:
            (masks,) = yield from select(deltas[k : k + 1].abs(), density[k : k + 1], eligible=free.unsqueeze(0))
            thin_deltas[k] = keep(deltas[k], masks)
        if exclusive is not None:
            free &= ~masks
    return thin_deltas


def _thin(delta: Tensor, gram: Tensor, score: ColumnScore, free: Tensor, share: Fraction, damping: float) -> Tensor:
    """Thins a task vector [r c] in place, for inputs of this Gram matrix [c c], which is changed; returns the mask."""
    rows, columns = delta.shape
    gram.diagonal().add_(damping * gram.diagonal().mean())
    # Row j of the upper factor of H^-1: its square at j is (H^-1)_jj of the columns from j on, the rest what they take.
    takes = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    mask = torch.empty_like(free)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        block, factor, stays = delta[:, first:last], takes[first:last, first:last], mask[:, first:last]
        room = count(share, rows * last) - count(share, rows * first)
        scores = score(block, slice(first, last), factor.diagonal().square())
        stays.copy_(_top(scores, room, free[:, first:last]))
        errors = torch.zeros_like(block)
        for j in range(last - first):
            errors[:, j] = block[:, j].masked_fill(stays[:, j], 0) / factor[j, j]
            block[:, j:] -= torch.outer(errors[:, j], factor[j, j:])
        block.masked_fill_(~stays, 0)  # but for rounding they are
        delta[:, last:] -= errors @ takes[first:last, last:]
    return mask


def _top(scores: Tensor, room: int, free: Tensor) -> Tensor:
    """The mask of the ``room`` highest scores [r c] among the free positions."""
    limit = torch.tensor([[room]], device=scores.device)
    return top_of_rows(scores.reshape(1, 1, -1), limit, free.reshape(1, 1, -1)).view_as(scores)
