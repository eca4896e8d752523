"""Task arithmetic of disentangled task vectors. AWD, https://arxiv.org/abs/2411.18729; docs/methods/weighting.md."""

from __future__ import annotations

from merger.methods.disentangle import Descents, disentangle
from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.ops.questions import Whole
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import Stage, method, stage


@method()
def awd(
    *,
    alpha: Number = 0.1,
    rate: Number = 0.01,
    steps: Descents = 300,
    scope: Whole = "global",
    weight: Numbers = 1,
    lambda_: Number = 1,
) -> list[Stage]:
    """Subtracts what makes the task vectors alike from each, and adds them."""
    return [
        stage(disentangle, alpha=alpha, rate=rate, steps=steps, scope=scope),
        stage(sum_, weight=weight),
        stage(scale, lambda_=lambda_),
    ]
