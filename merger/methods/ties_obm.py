"""TIES with OBM saliency as its trim. OBIM, section 3.3, Table 3; docs/methods/obim.md."""

from __future__ import annotations

from typing import Literal

from merger.methods.obm import obm
from merger.methods.ties import ties
from merger.pipeline.parameters import Number, Numbers, Shares
from merger.pipeline.registry import Stage, method, stage


@method()
def ties_obm(
    *,
    density: Shares = 0.2,
    weight: Numbers = 1,
    lambda_: Number = 1,
    hessian: Literal["second_moment", "mean_square", "none"] = "second_moment",
    nonlinear: Literal["random", "magnitude"] = "random",
    embedding: Literal["magnitude", "random", "token_freq"] = "magnitude",
    merge: Literal["mean", "sum", "max"] = "mean",
    zero_sign: Literal["zero", "majority", "positive"] = "zero",
) -> list[Stage]:
    """Keeps the most salient `density` of each tensor, then merges per position the experts that agree in sign."""
    saliency = stage(obm, hessian=hessian, nonlinear=nonlinear, embedding=embedding)
    return ties(
        density=density,
        weight=weight,
        lambda_=lambda_,
        scope="tensor",
        score=saliency,
        merge=merge,
        zero_sign=zero_sign,
    )
