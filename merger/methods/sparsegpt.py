"""SparseGPT on task vectors: what is kept makes up for what is dropped. https://arxiv.org/abs/2301.00774, section 3.

The authors' threshold keeps one entry less or more where scores are equal; here it is a count, of which each
block of columns has its part. They set the weights of inputs that are always 0 to 0; here those score lowest.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.methods._parameters import Share, Shares
from merger.methods._registry import Stage, sparsifier, stage
from merger.methods._spectral import has_matrix, whole
from merger.methods.top import top
from merger.ops import Flow, count, keep, select, top_of_rows

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
"""Columns whose entries are ranked together, as in the paper."""
LEAST = 1e-6
"""Damping from which on H is positive definite in float64, whatever the inputs."""


def _by_magnitude(kind: str, *, density: Any, **_: object) -> list[Stage] | None:
    return None if has_matrix(kind, head=True) else [stage(top, density=density)]


def _enough(*, damping: Fraction, **_: object) -> None:
    if damping < LEAST:
        raise ValueError(f"damping: is {float(damping):g}, expected at least {LEAST:g}, so that H has an inverse")


@sparsifier(takes=whole, calibrated=lambda **_: True, check=_enough, elsewhere=_by_magnitude)
def sparsegpt(deltas: Tensor, gram: Tensor | None, *, density: Shares = 0.5, damping: Share = 0.01) -> Flow[Tensor]:
    """Keeps the `density` of each task vector that its outputs need most, and changes it to come close to all of it.

    Columns are visited from left to right. What is dropped of one is added, as the inverse of H = E[x x^T] says,
    to those that are still to come; H has `damping` times its mean diagonal added. The entries of 128 columns are
    ranked by delta^2 / (H^-1)_jj at that point. Where inputs are not correlated nothing is added. A tensor without
    inputs of its own is thinned by magnitude. Needs calibration text; Gram matrices are made block by block.
    At density 0.5 and E[x x^T] = [[2, 1], [1, 2]], (1, 3) becomes (0, 3.495): 3 and 1/2.02 of what was dropped.
    """
    if gram is None:
        return keep(deltas, (yield from select(deltas.abs(), density)))
    thinned = deltas.clone()
    for k, share in enumerate(density):
        if gram[k].any():
            own, seen = (each[k].to(torch.float64, copy=True) for each in (deltas, gram))
            thinned[k] = _thinned(own, seen, share, float(damping)).to(deltas)
        else:
            thinned[k] = yield from _largest(deltas[k], share)
    return thinned


def _largest(delta: Tensor, share: Fraction) -> Flow[Tensor]:
    """The largest entries of a matrix [r c] that no input reached."""
    (kept,) = yield from select(delta.abs().unsqueeze(0), [share])
    return keep(delta, kept)


def _thinned(delta: Tensor, gram: Tensor, share: Fraction, damping: float) -> Tensor:
    """The task vector [r c], thinned for inputs of this Gram matrix [c c]; both are worked on where they are."""
    rows, columns = delta.shape
    gram.diagonal().add_(damping * gram.diagonal().mean())
    # Row j of the upper factor of H^-1: its square at j is (H^-1)_jj of the columns from j on, the rest what they take.
    takes = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        block, factor = delta[:, first:last], takes[first:last, first:last]
        wanted = count(share, rows * last) - count(share, rows * first)
        kept = _top((block / factor.diagonal()).square(), wanted)
        errors = torch.zeros_like(block)
        for j in range(last - first):
            errors[:, j] = block[:, j].masked_fill(kept[:, j], 0) / factor[j, j]
            block[:, j:] -= torch.outer(errors[:, j], factor[j, j:])
        block.masked_fill_(~kept, 0)  # but for rounding they are
        delta[:, last:] -= errors @ takes[first:last, last:]
    return delta


def _top(scores: Tensor, wanted: int) -> Tensor:
    """Where the highest of these scores [r c] are."""
    flat = scores.reshape(1, 1, -1)
    kept = top_of_rows(flat, torch.tensor([[wanted]], device=scores.device), torch.ones_like(flat, dtype=torch.bool))
    return kept.view_as(scores)
