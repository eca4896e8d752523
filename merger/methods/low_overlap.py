"""Balanced n:m masks with the smallest overlap. CABS, https://arxiv.org/abs/2503.01874, Algorithm 2."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from merger._lazy import torch
from merger.methods._claims import claims, remark_on_zeros
from merger.methods.bs import of_blocks, of_short_block
from merger.ops.arithmetic import keep
from merger.ops.questions import Flow, Size
from merger.ops.selection import top_of_blocks
from merger.pipeline.parameters import Order
from merger.pipeline.registry import Score, sparsifier

if TYPE_CHECKING:
    from torch import Tensor


def _claims(n: int, m: int, order: Sequence[int], claim_zeros: bool, **_: Any) -> Sequence[Fraction]:
    """The positions that no other expert holds: shared ones take part in a sum, where a zero closes nothing."""
    return claims(of_blocks(n, m, order), order, claim_zeros)


def _remark(experts: int, **parameters: Any) -> str:
    return remark_on_zeros(_claims(**parameters))


@sparsifier(align="m", claims=_claims, remark=_remark)
def low_overlap(
    deltas: Tensor,
    scores: Tensor,
    *,
    n: Annotated[int, Field(ge=0)] = 64,
    m: Annotated[int, Field(ge=1)] = 256,
    order: Order = "listed",
    score: Score = "magnitude",
    tail: Literal["proportional", "drop"] = "proportional",
    claim_zeros: bool = True,
) -> Flow[Tensor]:
    """Each expert keeps `n` of every `m` elements: the free ones first, then the best that others hold too.

    While all experts fit into a block this is `bs` with `exclusive`; two that do not fit share 2n - m of n.
    At 3:4, (4, -3, 1, 0) keeps its first three, then (-2, -4, 1, 3) the last and the first two.
    """
    short = of_short_block(n, m, (yield Size()) % m, tail)
    eligible = torch.ones_like(deltas, dtype=torch.bool) if claim_zeros else deltas != 0
    masks, used = torch.zeros_like(eligible), torch.zeros_like(eligible[0])
    for k in order:
        expert_scores, open_ = scores[k : k + 1], eligible[k : k + 1]
        unshared = top_of_blocks(expert_scores, n, m, open_ & ~used, short)
        priority = expert_scores.float().masked_fill(unshared, torch.inf)  # these stay, whatever the others score
        masks[k] = top_of_blocks(priority, n, m, (open_ & used) | unshared, short)[0]
        used |= masks[k]
    return keep(deltas, masks)
