"""Another method, and learning from its result on; docs/methods/regression.md.

As progressive distillation, https://arxiv.org/abs/2502.12706, goes from block to block, but of the weights themselves.
"""

from __future__ import annotations

from merger.methods.learn import Steps, learn
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import Anchor, Stage, method, stage


@method()
def distill(
    *,
    steps: Steps = 30,
    rate: Number = 5e-5,
    anchor: Anchor = "wudi_svc",
    weight: Numbers = 1,
) -> list[Stage]:
    """Takes some steps of gradient descent from the anchor's result towards the experts' outputs, block by block."""
    return [anchor, stage(learn, steps=steps, rate=rate, weight=weight)]
