"""DELLA's drop with a plain sum. https://arxiv.org/abs/2406.11617, section 2."""

from __future__ import annotations

from typing import Literal

from merger.methods.della import prune_and_rescale
from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.pipeline.parameters import Number, Numbers, Shares
from merger.pipeline.registry import Score, Stage, method, stage


@method()
def della_linear(
    *,
    density: Shares = 0.7,
    epsilon: Shares = 0.14,
    weight: Numbers = 1,
    lambda_: Number = 1.1,
    score: Score = "magnitude",
    scope: Literal["row", "tensor"] = "row",
    rank_norm: Literal["n", "n-1"] = "n",
    rescale: Literal["inverse", "l1", "l2", "none"] = "inverse",
) -> list[Stage]:
    """Drops small deltas more often than large ones of a row, rescales, and sums."""
    return [
        *prune_and_rescale(rescale, density=density, epsilon=epsilon, score=score, scope=scope, rank_norm=rank_norm),
        stage(sum_, weight=weight),
        stage(scale, lambda_=lambda_),
    ]
