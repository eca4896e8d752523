"""TIES-Merging: trim, elect sign, merge. https://arxiv.org/abs/2306.01708."""

from __future__ import annotations

from typing import Literal

from merger.methods.scale import scale
from merger.methods.sign_elect import sign_elect
from merger.methods.top import top
from merger.ops.questions import Scope
from merger.pipeline.parameters import Number, Numbers, Shares
from merger.pipeline.registry import Score, Stage, method, stage


@method()
def ties(
    *,
    density: Shares = 0.2,
    weight: Numbers = 1,
    lambda_: Number = 1,
    scope: Scope = "global",
    score: Score = "magnitude",
    merge: Literal["mean", "sum", "max"] = "mean",
    zero_sign: Literal["zero", "majority", "positive"] = "zero",
) -> list[Stage]:
    """Keeps the largest `density` of each task vector, then merges per position the experts that agree in sign.

    `scope: global` ranks the whole task vector at once, as the paper does; `tensor` ranks each tensor.
    """
    election_scope = "global" if scope == "global" else "tensor"
    return [
        stage(top, density=density, score=score, scope=scope),
        stage(sign_elect, weight=weight, merge=merge, zero_sign=zero_sign, scope=election_scope),
        stage(scale, lambda_=lambda_),
    ]
