"""Coefficients of task vectors that are learned through the whole model. AdaMerging, https://arxiv.org/abs/2310.02575.

See docs/methods/weighting.md.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from merger.methods.learn import Steps
from merger.ops.arithmetic import summed
from merger.pipeline.parameters import Number
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


def _check(*, rate: Fraction, **_: Any) -> None:
    if rate <= 0:
        raise ValueError(f"rate is {float(rate):g}, but steps of no length learn nothing")


@merger(exact=False, inputs=lambda **_: {"coefficients": "model_coefficients"}, check=_check)
def adamerging(
    deltas: Tensor,
    coefficients: Tensor | None,
    *,
    objective: Literal["entropy", "loss"] = "entropy",
    per: Literal["tensor", "model"] = "tensor",
    start: Number = 0.3,
    steps: Steps = 100,
    rate: Number = 0.01,
    clamp: bool = True,
) -> Tensor:
    """Adds the task vectors times coefficients that are learned from what the merged model predicts.

    From `start` on, `steps` steps of Adam at `rate` change a coefficient for each expert and tensor, or for each expert
    where they are learned `per: model`. They lower the `entropy` of the next token on the experts' texts, which needs
    no labels, or the `loss` of the token that comes next. Each step takes one batch of every expert's text. With
    `clamp` coefficients stay between 0 and 1. Needs calibration text; gradients are made block by block.
    """
    return summed(deltas * (float(start) if coefficients is None else coefficients.to(deltas)))
