"""Consensus merging of task arithmetic. https://arxiv.org/abs/2405.07813, section 4."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from merger.methods.consensus import consensus
from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import Stage, method, stage


@method()
def consensus_ta(
    *,
    k: Annotated[int, Field(ge=0)] = 2,
    lambda_t: Numbers = 0.4,
    weight: Numbers = 1,
    lambda_: Number = 0.3,
) -> list[Stage]:
    """Sums the task vectors and keeps the positions that at least `k` experts hold; the rest stays at the base."""
    return [
        stage(sum_, weight=weight),
        stage(consensus, k=k, lambda_t=lambda_t, weight=weight),
        stage(scale, lambda_=lambda_),
    ]
