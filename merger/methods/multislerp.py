"""A mean of directions for any number of models. Multi-SLERP, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea/.

Written there as one step along the sphere from the normalised weighted mean. That step is zero: what
pulls away from the mean adds up to nothing, so the normalised mean is the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from merger._lazy import torch
from merger.methods.mean import positive_sum
from merger.ops.arithmetic import combined
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False, check=positive_sum)
def multislerp(
    deltas: Tensor,
    base: Tensor,
    *,
    weight: Numbers = 1,
    space: Literal["delta", "weights"] = "delta",
    scope: Whole = "tensor",
    normalize: bool = True,
) -> Flow[Tensor]:
    """The weighted mean of the experts' directions, made as long as their weighted mean length.

    The directions are those of the task vectors or of the weights themselves. Where they cancel there
    is none, and the plain mean is taken. Unless `normalize` is on, the sum of `weight` multiplies the
    result. (3, 0) and (0, 3) make (2.1213, 2.1213).
    """
    vectors = deltas if space == "delta" else deltas + base
    flat = vectors.flatten(1).double()
    shares, lengths, cosines = sphere((yield Sum(flat @ flat.T, scope)), weight)
    middle = normalised(shares, cosines)
    merged = combined(vectors, shares if middle is None else on_vectors(middle, shares, lengths))
    if not normalize:
        merged *= float(sum(weight))
    return merged if space == "delta" else merged - base


def sphere(products: Tensor, weight: Sequence[Fraction]) -> tuple[Tensor, Tensor, Tensor]:
    """Of vectors with inner ``products`` [k k]: shares that add up to 1, lengths, cosines (0 for a zero vector)."""
    weights = torch.tensor([float(w / sum(weight)) for w in weight], dtype=torch.float64, device=products.device)
    lengths = products.diagonal().sqrt()
    inverse = _inverse(lengths)
    return weights, lengths, (products * inverse * inverse.unsqueeze(1)).clamp(-1, 1)


def normalised(direction: Tensor, cosines: Tensor) -> Tensor | None:
    """Coefficients [k] of unit vectors, scaled so that what they make has length 1; None where they cancel."""
    length = (direction @ cosines @ direction).clamp(min=0).sqrt()
    return None if length < 1e-7 else direction / length  # a sum of squares in float64 tells no less from 0


def on_vectors(direction: Tensor, shares: Tensor, lengths: Tensor) -> Tensor:
    """Coefficients of the vectors themselves for a unit ``direction``, at their mean length."""
    return direction * (shares @ lengths) * _inverse(lengths)


def _inverse(lengths: Tensor) -> Tensor:
    return torch.where(lengths > 0, 1 / lengths, 0)
