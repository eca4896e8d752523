"""Learn coefficients of the task vectors block by block. ProDistill, https://arxiv.org/abs/2502.12706.

See docs/methods/regression.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from merger.methods._spectral import has_matrix
from merger.methods.learn import Steps, check_steps
from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.ops.arithmetic import summed
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import Stage, Takes, merger, stage

if TYPE_CHECKING:
    from torch import Tensor


def _takes(*, per: str, **_: Any) -> Takes:
    return "rows" if per == "row" else "slice"


def _sum_elsewhere(kind: str, *, start: Any, **_: Any) -> list[Stage] | None:
    """Embeddings and the head are in no block."""
    is_learned = has_matrix(kind) or kind == "vector"
    return None if is_learned else [stage(sum_), stage(scale, lambda_=start)]


@merger(exact=False, takes=_takes, check=check_steps, elsewhere=_sum_elsewhere)
def prodistill(
    deltas: Tensor,
    coefficients: Tensor | None,
    *,
    per: Literal["element", "row", "matrix"] = "element",
    start: Number = 0.3,
    steps: Steps = 30,
    rate: Number = 0.01,
    weight: Numbers = 1,
) -> Tensor:
    """Adds the task vectors times coefficients that each block learns from the experts' outputs of it.

    From `start` on, `steps` steps of Adam at `rate` change a coefficient for each expert and each `per`: an element, a
    row (the weights of an output neuron) or a matrix. They bring the block's output, behind the merged blocks, closer
    to each expert's own on the expert's text: the squared distance as a share of the square, times `weight`, summed
    over the experts. What is in no block counts `start` times. Needs calibration text, and memory for a block's
    gradients.
    """
    return summed(deltas * (float(start) if coefficients is None else coefficients.to(deltas)))
