"""Multiply. The lambda of task arithmetic, https://arxiv.org/abs/2212.04089, section 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.pipeline.parameters import Number
from merger.pipeline.registry import scale as register

if TYPE_CHECKING:
    from torch import Tensor


@register()
def scale(deltas: Tensor, *, lambda_: Number = 1) -> Tensor:
    """Multiplies by `lambda`: (4, -3) at 0.5 is (2, -1.5)."""
    return deltas * float(lambda_)
