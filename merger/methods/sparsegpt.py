"""SparseGPT on task vectors: what is kept makes up for what is dropped. https://arxiv.org/abs/2301.00774, section 3.

The authors' threshold keeps one entry less or more where scores are equal; here it is a count, of which each
block of columns has its part. They set the weights of inputs that are always 0 to 0; here those score lowest.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.methods._spectral import has_matrix, whole
from merger.methods.top import top
from merger.ops.arithmetic import count, keep
from merger.ops.questions import Flow
from merger.ops.selection import select, top_of_rows
from merger.pipeline.parameters import Order, Share, Shares
from merger.pipeline.registry import Stage, sparsifier, stage

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
"""Columns whose entries are ranked together, as in the paper."""
LEAST = 1e-6
"""Damping from which on H is positive definite in float64, whatever the inputs."""


def _by_magnitude(kind: str, *, density: Any, **_: object) -> list[Stage] | None:
    return None if kind != "tied" and has_matrix(kind, head=True) else [stage(top, density=density)]


def _enough(*, damping: Fraction, **_: object) -> None:
    if damping < LEAST:
        raise ValueError(f"damping: is {float(damping):g}, expected at least {LEAST:g}, so that H has an inverse")


@sparsifier(takes=whole, exact=False, check=_enough, elsewhere=_by_magnitude)
def sparsegpt(
    deltas: Tensor,
    gram: Tensor | None,
    *,
    density: Shares = 0.5,
    damping: Share = 0.01,
    exclusive: Order | None = None,
) -> Flow[Tensor]:
    """Keeps the `density` of each task vector that its outputs need most, and changes it to come close to all of it.

    Columns are visited from left to right. What is dropped of one is added, as the inverse of H = E[x x^T] says,
    to those that are still to come; H has `damping` times its mean diagonal added. The entries of 128 columns are
    ranked by delta^2 / (H^-1)_jj at that point. Where inputs are not correlated nothing is added. A tensor without
    inputs of its own is thinned by magnitude. With `exclusive` an expert chooses only among positions that earlier
    ones left free. Needs calibration text; Gram matrices are made block by block.
    At density 0.5 and E[x x^T] = [[2, 1], [1, 2]], (1, 3) becomes (0, 3.495): 3 and 1/2.02 of what was dropped.
    """
    if gram is None:
        return keep(deltas, (yield from select(deltas.abs(), density, order=exclusive)))
    thinned, free = torch.empty_like(deltas), torch.ones_like(deltas[0], dtype=torch.bool)
    for k in range(len(deltas)) if exclusive is None else exclusive:
        if gram[k].any():
            delta, expert_gram = (tensors[k].to(torch.float64, copy=True) for tensors in (deltas, gram))
            masks = _thin(delta, expert_gram, free, density[k], float(damping))
            thinned[k] = delta
        else:
            (masks,) = yield from select(deltas[k : k + 1].abs(), density[k : k + 1], eligible=free.unsqueeze(0))
            thinned[k] = keep(deltas[k], masks)
        if exclusive is not None:
            free &= ~masks
    return thinned


def _thin(delta: Tensor, gram: Tensor, free: Tensor, share: Fraction, damping: float) -> Tensor:
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
        stays.copy_(_top((block / factor.diagonal()).square(), room, free[:, first:last]))
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
