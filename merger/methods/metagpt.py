"""Weights from the size of each task vector. MetaGPT, https://arxiv.org/abs/2406.11385; docs/methods/weighting.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods.mean import mean
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False)
def metagpt(deltas: Tensor, *, scope: Whole = "global") -> Flow[Tensor]:
    """The mean of the task vectors, each weighted by its squared norm over the whole model or the tensor.

    (4, -3) and (0, 5) weigh 25 and 25, and make (2, 1). Where nothing changed all weigh alike.
    """
    squares = (yield Sum(deltas.double().square().sum((1, 2)), scope)).tolist()
    return mean(deltas, weight=squares if any(squares) else [1] * len(deltas))
