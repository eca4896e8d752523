"""The mean weighted by how much each expert changed, as in FR-Merging, https://arxiv.org/abs/2411.16815.

See docs/methods/weighting.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods.mean import mean
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False)
def magnitude_mean(deltas: Tensor, originals: Tensor, *, scope: Whole = "global") -> Flow[Tensor]:
    """The mean of the task vectors, each weighted by the mean size of what its expert changed.

    The size is that of the task vectors before the first stage, over the whole model or the tensor.
    (4, -2) and (0, 2) weigh 6 and 2, and make (3, -1). Where nothing changed all weigh alike.
    """
    sizes = (yield Sum(originals.double().abs().sum((1, 2)), scope)).tolist()
    return mean(deltas, weight=sizes if any(sizes) else [1] * len(deltas))
