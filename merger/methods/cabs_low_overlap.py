"""CABS for densities that add up to more than 1. https://arxiv.org/abs/2503.01874, Algorithm 2.

The authors' 7B code fills shared positions differently, and keeps the asked density only at n = 3m/4;
this is the paper's text.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from merger.methods.low_overlap import low_overlap
from merger.methods.sum import sum_
from merger.pipeline.parameters import Numbers, Order
from merger.pipeline.registry import Score, Stage, method, stage


@method()
def cabs_low_overlap(
    *,
    n: Annotated[int, Field(ge=0)] = 64,
    m: Annotated[int, Field(ge=1)] = 256,
    lambda_: Numbers = 1,
    order: Order = "listed",
    score: Score = "magnitude",
    claim_zeros: bool = True,
) -> list[Stage]:
    """Each expert keeps `n` of every `m` elements, shared with others only where it must be, times its `lambda`."""
    return [
        stage(low_overlap, n=n, m=m, order=order, score=score, claim_zeros=claim_zeros),
        stage(sum_, weight=lambda_),
    ]
