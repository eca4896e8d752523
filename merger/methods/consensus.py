"""Keep what several experts agree on: TALL masks as a filter. Consensus merging, https://arxiv.org/abs/2405.07813.

The authors compare with >, here it is >=: an unchanged position then counts, which adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from merger._lazy import torch
from merger.ops.arithmetic import at_least, column, keep, summed
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import filter_

if TYPE_CHECKING:
    from torch import Tensor


def _out_of_reach(experts: int, k: int, **_: object) -> str:
    return f"k is {k}, more than there are experts ({experts}), so all stays at the base" if k > experts else ""


@filter_(remark=_out_of_reach)
def consensus(
    deltas: Tensor,
    originals: Tensor,
    *,
    k: Annotated[int, Field(ge=0)] = 2,
    lambda_t: Numbers = 0.4,
    weight: Numbers = 1,
) -> Tensor:
    """Keeps the positions of the merged task vector that at least `k` experts hold.

    An expert holds a position where its own delta, times its `weight`, is at least `lambda_t` times
    what separates it from the merged one. Of (3, 0) and (1, 4), merged to (4, 4), two experts hold
    the first at lambda_t 0.3 and one the second: (4, 0).
    """
    holders = tall_mask(originals * column(weight, originals), deltas, lambda_t)
    return keep(deltas, summed(holders.view(torch.int8)) >= k)


def tall_mask(vectors: Tensor, merged: Tensor, lambda_t: Sequence[Fraction]) -> Tensor:
    """The mask [k r c] where a task vector is at least `lambda_t` times as large as the rest of ``merged`` [r c]."""
    limits = (merged - vectors).abs() * column(lambda_t, vectors)
    return at_least(vectors.abs(), limits)
