"""Take only what stands out. Arcee Fusion, https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration.

mergekit estimates the quartiles of a tensor of more than a million elements from a random sample; here they are exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.ops.arithmetic import keep
from merger.ops.questions import Flow, Size
from merger.ops.radix import ordered
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False, experts=1)
def arcee_fusion(deltas: Tensor, base: Tensor) -> Flow[Tensor]:
    """Takes the expert's weights whose importance is an outlier of its tensor; the rest stays at the base.

    The importance of a change is its size times the divergence KL(expert || base) of its row, each
    row read as a softmax. It is taken from the median plus 1.5 times the distance between the quartiles
    on. Of the changes (9, 0, 0, 1, 1) of one row only the 9 exceeds 1 + 1.5 * (1 - 0) times the divergence.
    """
    last = (yield Size()) - 1
    divergence = _divergence((base + deltas[0]).double(), base.double())
    importance = (deltas[0].abs() * divergence).float()
    low, median, high = yield from ordered(importance[None], [[last // 4, last // 2, last * 3 // 4]], "tensor")
    return keep(deltas[0], importance >= (median + 1.5 * (high - low))[0])


def _divergence(weights: Tensor, base: Tensor) -> Tensor:
    """KL of each row's softmax from the base's: [r 1], with a floor of 1e-8 under every probability."""
    p, q = weights.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    return (p * (p / q).log()).sum(-1, keepdim=True)
