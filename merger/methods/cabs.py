"""CABS: conflict-aware, balanced sparsification. https://arxiv.org/abs/2503.01874, Algorithm 1."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from merger.methods.bs import bs
from merger.methods.sum import sum_
from merger.pipeline.parameters import Numbers, Order
from merger.pipeline.registry import Score, Stage, method, stage


@method()
def cabs(
    *,
    n: Annotated[int, Field(ge=0)] = 64,
    m: Annotated[int, Field(ge=1)] = 256,
    lambda_: Numbers = 1,
    order: Order = "listed",
    score: Score = "magnitude",
    claim_zeros: bool = True,
) -> list[Stage]:
    """Each expert in turn keeps `n` of every `m` elements among those the earlier ones left, times its `lambda`."""
    return [
        stage(bs, n=n, m=m, score=score, exclusive=order, claim_zeros=claim_zeros),
        stage(sum_, weight=lambda_),
    ]
