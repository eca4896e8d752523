"""Consensus merging of TIES. https://arxiv.org/abs/2405.07813, section 4."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from merger.methods.consensus import consensus
from merger.methods.scale import scale
from merger.methods.ties import ties
from merger.ops.questions import Scope
from merger.pipeline.parameters import Number, Numbers, Shares
from merger.pipeline.registry import Score, Stage, method, stage


@method()
def consensus_ties(
    *,
    density: Shares = 0.2,
    k: Annotated[int, Field(ge=0)] = 2,
    lambda_t: Numbers = 0.4,
    weight: Numbers = 1,
    lambda_: Number = 0.3,
    scope: Scope = "global",
    score: Score = "magnitude",
    zero_sign: Literal["zero", "majority", "positive"] = "zero",
) -> list[Stage]:
    """Sums what TIES trims and elects, and keeps the positions that at least `k` experts hold."""
    trim, elect, _ = ties(density=density, weight=weight, scope=scope, score=score, merge="sum", zero_sign=zero_sign)
    return [
        trim,
        elect,
        stage(consensus, k=k, lambda_t=lambda_t, weight=weight),
        stage(scale, lambda_=lambda_),
    ]
