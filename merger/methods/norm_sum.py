"""Add task vectors at their mean norm. The scaling of OPCM, https://arxiv.org/abs/2501.09522.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.methods._spectral import weighted
from merger.ops.arithmetic import summed
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False)
def norm_sum(deltas: Tensor, *, weight: Numbers = 1, scope: Whole = "global") -> Flow[Tensor]:
    """The weighted sum of the task vectors, times what makes its norm the mean of theirs.

    The norms are those of the whole model, or of the tensor. (3, 0) and (0, 3) make (2.1213, 2.1213).
    """
    terms = weighted(deltas, weight)
    return (yield from at_mean_norm(summed(terms), terms, scope)).to(deltas)


def at_mean_norm(total: Tensor, terms: Tensor, scope: Whole) -> Flow[Tensor]:
    """``total`` [r c], times what makes its norm the mean of the norms of ``terms`` [k r c]."""
    squares = torch.stack([vector.square().sum() for vector in (total, *terms)])
    norm, *norms = (yield Sum(squares, scope)).sqrt().tolist()
    return total * (sum(norms) / len(norms) / norm if norm else 0.0)
