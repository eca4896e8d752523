"""Model Breadcrumbs: drop the small and the outliers. https://arxiv.org/abs/2312.06795."""

from __future__ import annotations

from merger.methods.band import band
from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.ops.questions import Scope
from merger.pipeline.parameters import Number, Numbers, Shares
from merger.pipeline.registry import Score, Stage, method, stage


@method()
def breadcrumbs(
    *,
    drop_low: Shares = 0.85,
    drop_high: Shares = 0.01,
    weight: Numbers = 1,
    lambda_: Number = 0.3,
    score: Score = "magnitude",
    scope: Scope = "tensor",
) -> list[Stage]:
    """Drops the smallest `drop_low` and the largest `drop_high` of each task vector, and sums the rest."""
    return [
        stage(band, drop_low=drop_low, drop_high=drop_high, score=score, scope=scope),
        stage(sum_, weight=weight),
        stage(scale, lambda_=lambda_),
    ]
