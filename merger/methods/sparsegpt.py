"""SparseGPT on task vectors: what is kept makes up for what is dropped. https://arxiv.org/abs/2301.00774, section 3.

The authors' threshold keeps one entry less or more where scores are equal; here it is a count, of which each
block of columns has its part. They set the weights of inputs that are always 0 to 0; here those score lowest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._spectral import whole
from merger.methods._thinning import by_magnitude, check_damping, thinned
from merger.ops.questions import Flow
from merger.pipeline.parameters import Order, Share, Shares
from merger.pipeline.registry import sparsifier

if TYPE_CHECKING:
    from torch import Tensor


@sparsifier(takes=whole, exact=False, check=check_damping, elsewhere=by_magnitude)
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
    return thinned(deltas, gram, _saliency, density, damping, exclusive)


def _saliency(delta: Tensor, columns: slice, inverse: Tensor) -> Tensor:
    """What the loss would grow by without an entry: delta^2 / (H^-1)_jj [r b]."""
    return (delta / inverse.sqrt()).square()
