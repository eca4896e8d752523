"""DELLA: drop by magnitude, elect, fuse. https://arxiv.org/abs/2406.11617."""

from __future__ import annotations

from typing import Literal

from merger.methods.magprune import magprune
from merger.methods.rescale import rescale as rescale_norm
from merger.methods.scale import scale
from merger.methods.sign_elect import sign_elect
from merger.pipeline.parameters import Number, Numbers, Shares
from merger.pipeline.registry import Score, Stage, method, stage


def prune_and_rescale(rescale: str, **magprune_parameters: object) -> list[Stage]:
    """DELLA's sparsifier, divided by the keep probabilities or given the old norm back."""
    if rescale in ("l1", "l2"):
        return [stage(magprune, rescale="none", **magprune_parameters), stage(rescale_norm, by=rescale)]
    return [stage(magprune, rescale=rescale, **magprune_parameters)]


@method()
def della(
    *,
    density: Shares = 0.7,
    epsilon: Shares = 0.14,
    weight: Numbers = 1,
    lambda_: Number = 1.1,
    score: Score = "magnitude",
    scope: Literal["row", "tensor"] = "row",
    rank_norm: Literal["n", "n-1"] = "n",
    rescale: Literal["inverse", "l1", "l2", "none"] = "inverse",
    merge: Literal["mean", "sum", "max"] = "mean",
    zero_sign: Literal["zero", "majority", "positive"] = "zero",
) -> list[Stage]:
    """Drops small deltas more often than large ones of a row, rescales, then merges those that agree in sign."""
    return [
        *prune_and_rescale(rescale, density=density, epsilon=epsilon, score=score, scope=scope, rank_norm=rank_norm),
        stage(sign_elect, weight=weight, merge=merge, zero_sign=zero_sign),
        stage(scale, lambda_=lambda_),
    ]
