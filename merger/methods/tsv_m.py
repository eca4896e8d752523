"""Task singular vectors, decorrelated. TSV-Merge, https://arxiv.org/abs/2412.00081, section 3.3.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._spectral import averaged, whole
from merger.ops.arithmetic import column
from merger.ops.linalg import decorrelated, side_by_side, svd
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False, takes=whole, elsewhere=averaged)
def tsv_m(deltas: Tensor, *, weight: Numbers = 1, lambda_: Number = 1, head: bool = False) -> Tensor:
    """Keeps the strongest 1/K of each expert's singular directions, and turns them until no two overlap.

    `lambda` is the paper's alpha. What is no matrix (and the head, unless `head`) gets the mean.
    Two experts diag(4, 3, 2, 1) make diag(4, 3, 0, 0).
    """
    deltas = deltas * column(weight, deltas)
    if len(deltas) == 1:  # all directions are kept, and are orthogonal as they are
        return deltas[0] * float(lambda_)
    rank = max(1, min(deltas.shape[1:]) // len(deltas))
    directions = side_by_side([svd(delta, rank=rank) for delta in deltas])
    return (decorrelated(directions) * float(lambda_)).to(deltas)
