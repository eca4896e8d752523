"""Parameter competition balancing as the authors' code does it. PCB-Merging, https://arxiv.org/abs/2410.02396.

The code differs from the paper's text: scores have a sign, so positions in conflict drop out, and the
weights start at 0 at the threshold (docs/methods/sparsification.md).
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.arithmetic import count, summed
from merger.ops.questions import Flow, Size, Whole
from merger.ops.radix import ordered
from merger.pipeline.parameters import Shares
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor

OUTLIERS = Fraction(1, 10_000)  # the share at each end whose magnitude is clamped


@merger(exact=False)
def pcb_official(deltas: Tensor, *, density: Shares = 0.1, scope: Whole = "global") -> Flow[Tensor]:
    """Averages what is left of each clamped task vector, weighted by how far its score exceeds the threshold.

    The score is exp(K * N(|delta|)^2) * tanh(delta * the sum of all deltas), and N maps the tensor or
    the model to [0, 1]. The threshold is each expert's highest score but for the `density` above it.
    """
    size = yield Size(scope)
    last = max(count(1 - OUTLIERS, size) - 1, 0)
    low, high = yield from ordered(deltas.abs(), [[count(OUTLIERS, size), last]] * len(deltas), scope)
    magnitudes = deltas.abs().clamp(low, high)
    stands_out = _normalised(magnitudes.double(), low, high).square_().mul_(len(deltas)).exp_()
    goes_with = (deltas * summed(deltas)).double().tanh_()
    score = (stands_out * goes_with).to(deltas)
    places = [[min(count(1 - share, size), size - 1), size - 1] for share in density]
    threshold, highest = yield from ordered(score, places, scope)
    weights = _normalised(score.clamp(min=threshold), threshold, highest)
    return summed(weights * magnitudes * deltas.sign()) / summed(weights).clamp_(min=1e-12)


def _normalised(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``values`` [k r c] from 0 at ``low`` [k 1 1] to 1 at ``high``; 0 where these are equal."""
    span = high - low
    return (values - low) / torch.where(span > 0, span, 1)
