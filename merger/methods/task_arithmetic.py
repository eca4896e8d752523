"""Add scaled task vectors to the base. Task arithmetic, https://arxiv.org/abs/2212.04089."""

from __future__ import annotations

from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import Stage, method, stage


@method()
def task_arithmetic(*, weight: Numbers = 1, lambda_: Number = 1) -> list[Stage]:
    """Base plus `lambda` times the weighted sum of the task vectors; a negative weight forgets."""
    return [stage(sum_, weight=weight), stage(scale, lambda_=lambda_)]
