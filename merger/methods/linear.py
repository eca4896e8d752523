"""Weighted average of the models. Model soups, https://arxiv.org/abs/2203.05482, section 2."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from merger.methods.mean import mean, positive_sum
from merger.methods.sum import sum_
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


def _mean_exists(weight: Sequence[Fraction], normalize: bool) -> None:
    if normalize:
        positive_sum(weight)


@merger(check=_mean_exists)
def linear(deltas: Tensor, base: Tensor, *, weight: Numbers = 1, normalize: bool = True) -> Tensor:
    """The weighted sum of the experts' weights, divided by the sum of `weight` unless `normalize` is off.

    Task vectors (4, -3) and (-2, -4) on a base of ones make weights (2, -2.5).
    """
    if normalize:
        return mean(deltas, weight=weight)
    return sum_(deltas, weight=weight) + base * float(sum(weight) - 1)
