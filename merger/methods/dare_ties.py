"""DARE, then the sign election of TIES. https://arxiv.org/abs/2311.03099, section 3."""

from __future__ import annotations

from typing import Literal

from merger.methods.dare_linear import Rescale, drop_and_rescale
from merger.methods.scale import scale
from merger.methods.sign_elect import sign_elect
from merger.pipeline.parameters import Number, Numbers, Shares
from merger.pipeline.registry import Stage, method, stage


@method()
def dare_ties(
    *,
    density: Shares = 0.5,
    weight: Numbers = 1,
    lambda_: Number = 1,
    rescale: Rescale = "inverse",
    merge: Literal["mean", "sum", "max"] = "mean",
    zero_sign: Literal["zero", "majority", "positive"] = "zero",
) -> list[Stage]:
    """Drops each delta with probability 1 - `density`, rescales, then merges the experts that agree in sign."""
    return [
        *drop_and_rescale(density, rescale),
        stage(sign_elect, weight=weight, merge=merge, zero_sign=zero_sign),
        stage(scale, lambda_=lambda_),
    ]
