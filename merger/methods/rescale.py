"""Give a thinned task vector its norm back: what mergekit does after DARE and DELLA, https://github.com/arcee-ai/mergekit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from merger.ops.questions import Flow, Sum
from merger.pipeline.registry import sparsifier

if TYPE_CHECKING:
    from torch import Tensor


@sparsifier(exact=False)
def rescale(deltas: Tensor, originals: Tensor, *, by: Literal["l1", "l2"] = "l1") -> Flow[Tensor]:
    """Scales each expert's tensor so that its l1 or l2 norm is that of the task vector before the pipeline.

    (4, -3, 1, 0) thinned to (4, 0, 0, 0) becomes (8, 0, 0, 0) by l1.
    """
    power = 1 if by == "l1" else 2
    norms = yield Sum(originals.double().abs().pow(power).sum((1, 2)))
    thinned_norms = yield Sum(deltas.double().abs().pow(power).sum((1, 2)))
    factor: Tensor = (norms / thinned_norms.where(thinned_norms > 0, 1)).pow(1 / power)
    return deltas * factor.to(deltas).view(-1, 1, 1)
