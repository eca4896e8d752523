"""Optimal Brain Iterative Merging: OBM saliency, iterative merging. OBIM, section 3.3; docs/methods/obim.md."""

from __future__ import annotations

from typing import Literal

from merger.methods.im import im
from merger.methods.mean import mean
from merger.methods.obm import obm
from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.ops.arithmetic import RatioOf
from merger.pipeline.parameters import Number, Numbers, Order, SharesOrAuto
from merger.pipeline.registry import Stage, method, stage


@method()
def obim(
    experts: tuple[str, ...],
    kind: str,
    *,
    density: SharesOrAuto = "auto",
    order: Order = "rotation",
    hessian: Literal["second_moment", "mean_square", "none"] = "second_moment",
    nonlinear: Literal["random", "magnitude", "average", "base"] = "random",
    embedding: Literal["magnitude", "random", "token_freq"] = "magnitude",
    ratio_of: RatioOf = "total",
    count_base: bool = False,
    claim_zeros: bool = True,
    weight: Numbers = 1,
    lambda_: Number = 1,
) -> list[Stage]:
    """Each expert claims the positions whose loss would change its layers' outputs most, none of them twice.

    Biases and norms have no inputs of their own and are claimed at random, as in the paper, or by
    magnitude, averaged, or left at the base (`nonlinear`). Needs calibration text.
    """
    if kind in ("vector", "other") and nonlinear == "average":
        return [stage(mean, weight=weight), stage(scale, lambda_=lambda_)]
    if kind in ("vector", "other") and nonlinear == "base":
        return [stage(sum_, weight=weight), stage(scale, lambda_=0)]
    fallback = nonlinear if nonlinear in ("random", "magnitude") else "magnitude"
    saliency = stage(obm, hessian=hessian, nonlinear=fallback, embedding=embedding)
    return im(
        experts,
        density=density,
        order=order,
        score=saliency,
        scope="tensor",
        ratio_of=ratio_of,
        count_base=count_base,
        claim_zeros=claim_zeros,
        weight=weight,
        lambda_=lambda_,
    )
