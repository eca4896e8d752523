"""Add task vectors. Task arithmetic, https://arxiv.org/abs/2212.04089, section 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.ops.arithmetic import weighted_sum
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger()
def sum_(deltas: Tensor, *, weight: Numbers = 1) -> Tensor:
    """The weighted sum of the task vectors: (4, -3) and (-2, -4) make (2, -7)."""
    return weighted_sum(deltas, weight)
