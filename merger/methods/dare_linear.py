"""DARE with a plain sum. https://arxiv.org/abs/2311.03099."""

from __future__ import annotations

from typing import Literal

from merger.methods.random import random
from merger.methods.rescale import rescale as rescale_norm
from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.pipeline.parameters import Number, Numbers, Shares
from merger.pipeline.registry import Stage, method, stage

Rescale = Literal["inverse", "l1", "l2", "none"]


def drop_and_rescale(density: Shares, rescale: Rescale) -> list[Stage]:
    """DARE's sparsifier: dropped at random, then divided by the density or given the old norm back."""
    if rescale in ("l1", "l2"):
        return [stage(random, density=density, rescale="none"), stage(rescale_norm, by=rescale)]
    return [stage(random, density=density, rescale=rescale)]


@method()
def dare_linear(
    *,
    density: Shares = 0.5,
    weight: Numbers = 1,
    lambda_: Number = 1,
    rescale: Rescale = "inverse",
) -> list[Stage]:
    """Drops each delta with probability 1 - `density`, rescales what is left, and sums."""
    return [
        *drop_and_rescale(density, rescale),
        stage(sum_, weight=weight),
        stage(scale, lambda_=lambda_),
    ]
