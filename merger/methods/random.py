"""Drop at random and rescale. DARE, https://arxiv.org/abs/2311.03099, section 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from merger.ops.arithmetic import at_least, column, keep
from merger.ops.selection import exclusive as disjoint
from merger.pipeline.parameters import Order, Shares
from merger.pipeline.registry import sparsifier

if TYPE_CHECKING:
    from torch import Tensor

    from merger.pipeline.registry import Draw


@sparsifier()
def random(
    deltas: Tensor,
    uniform: Draw,
    *,
    density: Shares = 1,
    rescale: Literal["inverse", "none"] = "inverse",
    exclusive: Order | None = None,
) -> Tensor:
    """Keeps each element with probability `density`, and divides what is kept by it.

    The expectation is the task vector itself. At density 0.5 a kept 4 becomes 8.
    """
    share = column(density, deltas)
    mask = at_least(uniform("dare"), column([1 - d for d in density], deltas))
    if exclusive is not None:
        mask = disjoint(mask, exclusive)
    thinned = keep(deltas, mask)
    return thinned / share.where(share > 0, 1) if rescale == "inverse" else thinned
