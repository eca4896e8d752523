"""Drop the small ones more often. DELLA, https://arxiv.org/abs/2406.11617, section 2.1.

The survey that restates it gives the larger magnitude the higher drop probability; the method's own
text and code give it the lower one, and so does this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from merger.ops.arithmetic import at_least, column, keep
from merger.ops.selection import exclusive as disjoint
from merger.ops.selection import ranks_of_rows
from merger.pipeline.parameters import Order, Shares
from merger.pipeline.registry import Score, Takes, sparsifier

if TYPE_CHECKING:
    from torch import Tensor

    from merger.pipeline.registry import Draw


def _window(density: Sequence[Fraction], epsilon: Sequence[Fraction], **_: object) -> None:
    for share, width in zip(density, epsilon, strict=True):
        low, high = 1 - share - width / 2, 1 - share + width / 2
        if low < 0 or high >= 1:
            raise ValueError(
                f"drop rates from {float(low):g} to {float(high):g} leave [0, 1): "
                f"1 - density must lie at least epsilon / 2 = {float(width / 2):g} from both ends"
            )


def _takes(scope: str, **_: object) -> Takes:
    return "rows" if scope == "row" else "matrix"


@sparsifier(takes=_takes, check=_window)
def magprune(
    deltas: Tensor,
    scores: Tensor,
    uniform: Draw,
    *,
    density: Shares = 0.7,
    epsilon: Shares = 0.14,
    score: Score = "magnitude",
    scope: Literal["row", "tensor"] = "row",
    rank_norm: Literal["n", "n-1"] = "n",
    rescale: Literal["inverse", "none"] = "inverse",
    exclusive: Order | None = None,
) -> Tensor:
    """Drops at random, the more often the lower an element ranks in its row, and rescales by what was kept.

    The element of rank r of n (0 for the highest score) is dropped with probability
    p - epsilon / 2 + epsilon * r / n, where p = 1 - density. For p = 0.5 and epsilon = 0.4 the row
    (4, -3, 1, 0) has drop rates 0.3, 0.4, 0.5, 0.6.
    """
    ranked = scores.flatten(1).unsqueeze(1) if scope == "tensor" else scores
    length = ranked.shape[-1] - (rank_norm == "n-1")
    # by a tensor: CUDA multiplies by the reciprocal of a number, which rounds otherwise
    lengths = column([Fraction(length)] * len(deltas), deltas)
    spread = ranks_of_rows(ranked).view(scores.shape) / lengths if length else 0.5
    width = column(epsilon, deltas)
    drop = width * spread + (1 - column(density, deltas) - width / 2)
    mask = at_least(uniform("della"), drop)
    if exclusive is not None:
        mask = disjoint(mask, exclusive)
    thinned = keep(deltas, mask)
    return thinned / (1 - drop) if rescale == "inverse" else thinned
