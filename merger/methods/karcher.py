"""The mean on the sphere. Karcher mean, https://en.wikipedia.org/wiki/Karcher_mean; docs/methods/averages.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from merger._lazy import torch
from merger.methods.mean import positive_sum
from merger.methods.multislerp import normalised, on_vectors, sphere
from merger.ops.arithmetic import combined
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.parameters import Numbers, Share
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False, check=positive_sum)
def karcher(
    deltas: Tensor,
    base: Tensor,
    *,
    weight: Numbers = 1,
    space: Literal["delta", "weights"] = "delta",
    scope: Whole = "tensor",
    max_iter: Annotated[int, Field(ge=1)] = 100,
    tol: Share = 1e-7,
) -> Flow[Tensor]:
    """The direction with the least squared angles to the experts', made as long as their weighted mean length.

    The directions are those of the task vectors or of the weights themselves. The search needs only
    the angles between experts, so the model is read no oftener than for `slerp`.
    (2, 0, 0), (0, 2, 0) and (0, 0, 2) make (1.1547, 1.1547, 1.1547).
    """
    vectors = deltas if space == "delta" else deltas + base
    flat = vectors.flatten(1).double()
    shares, lengths, cosines = sphere((yield Sum(flat @ flat.T, scope)), weight)
    middle = normalised(shares, cosines)
    for _ in range(max_iter):
        if middle is None:
            break
        step, length = _pull(middle, shares, cosines)
        if length <= float(tol):
            break
        middle = normalised(middle * length.cos() + step * (length.sin() / length), cosines)
    merged = combined(vectors, shares if middle is None else on_vectors(middle, shares, lengths))
    return merged if space == "delta" else merged - base


def _pull(middle: Tensor, shares: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of the arcs from ``middle`` to each unit vector, in coefficients of these, and its length."""
    cosine = (cosines @ middle).clamp(-1, 1)
    sine = (1 - cosine.square()).sqrt()
    pull = shares * torch.where(sine > 1e-12, cosine.acos() / sine, 1)
    step = pull - middle * (pull @ cosine)
    return step, (step @ cosines @ step).clamp(min=0).sqrt()
