"""Patch the base with what each expert needs most. Model Tailor, https://arxiv.org/abs/2402.12048.

See docs/methods/weighting.md.
"""

from __future__ import annotations

from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.methods.tailor import tailor
from merger.pipeline.parameters import Number, Numbers, Share, Shares
from merger.pipeline.registry import Stage, method, stage


@method()
def model_tailor(
    *, density: Shares = 0.1, damping: Share = 0.01, weight: Numbers = 1, lambda_: Number = 1
) -> list[Stage]:
    """Keeps of each task vector a sparse patch that makes up for what is left out, and adds the patches."""
    return [
        stage(tailor, density=density, damping=damping),
        stage(sum_, weight=weight),
        stage(scale, lambda_=lambda_),
    ]
