"""Balanced n:m sparsification. CABS, https://arxiv.org/abs/2503.01874, section 4.2."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from merger.methods._claims import claims, remark_on_zeros
from merger.ops.arithmetic import keep
from merger.ops.questions import Flow, Size
from merger.ops.selection import in_turn, top_of_blocks
from merger.pipeline.parameters import Order
from merger.pipeline.registry import Score, sparsifier

if TYPE_CHECKING:
    from torch import Tensor


def of_short_block(n: int, m: int, length: int, tail: str) -> int:
    """How many a last block of ``length`` < m elements keeps (docs/methods/cabs.md)."""
    return n * length // m if tail == "proportional" else 0


def _claims(n: int, m: int, exclusive: Sequence[int] | None, claim_zeros: bool, **_: Any) -> Sequence[Fraction]:
    """Each expert's n of m, or as many as those before it left."""
    return claims(of_blocks(n, m, exclusive or ()), exclusive, claim_zeros)


def of_blocks(n: int, m: int, order: Sequence[int]) -> list[Fraction]:
    """The share of a block that each expert gets who takes ``n`` of ``m`` elements, or those that are left."""
    shares = [Fraction(0)] * len(order)
    for i, k in enumerate(order):
        shares[k] = Fraction(max(0, min(n, m - i * n)), m)
    return shares


def _remark(experts: int, **parameters: Any) -> str:
    return remark_on_zeros(_claims(**parameters))


@sparsifier(align="m", claims=_claims, remark=_remark)
def bs(
    deltas: Tensor,
    scores: Tensor,
    *,
    n: Annotated[int, Field(ge=0)] = 64,
    m: Annotated[int, Field(ge=1)] = 256,
    score: Score = "magnitude",
    tail: Literal["proportional", "drop"] = "proportional",
    exclusive: Order | None = None,
    claim_zeros: bool = True,
) -> Flow[Tensor]:
    """Keeps the `n` highest scores of every `m` consecutive elements of the flat tensor.

    A shorter last block of r elements keeps floor(n * r / m) of them, or none; an `n` of `m` or more
    keeps every full block whole. With `exclusive` an expert chooses only among positions that earlier
    ones left free.
    At 2:4, (5, 1, -4, 2, 3, -9, 8) keeps 5, -4 and -9.
    """
    short = of_short_block(n, m, (yield Size()) % m, tail)
    eligible = None if claim_zeros else deltas != 0

    def take(experts: slice, free: Tensor | None) -> Flow[Tensor]:
        yield from ()  # a flow without questions
        return top_of_blocks(scores[experts], n, m, free, short)

    mask = yield from (take(slice(None), eligible) if exclusive is None else in_turn(exclusive, eligible, take))
    return keep(deltas, mask)
