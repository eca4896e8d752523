"""Spherical interpolation with weights, by tensor, row or column. NuSLERP of mergekit, https://github.com/arcee-ai/mergekit.

Vectors count as collinear from a sine of 1e-7 down; mergekit's 1e-8 is finer than a float64 cosine can tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from merger._lazy import torch
from merger.methods.mean import positive_sum
from merger.ops.arithmetic import combined
from merger.ops.questions import Flow, Size, Sum
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import Takes, merger

if TYPE_CHECKING:
    from torch import Tensor


def _takes(scope: str, **_: object) -> Takes:
    return "slice" if scope == "tensor" else "rows"


@merger(exact=False, takes=_takes, experts=2, check=positive_sum)
def nuslerp(
    deltas: Tensor,
    base: Tensor,
    *,
    weight: Numbers = 1,
    space: Literal["delta", "weights"] = "delta",
    scope: Literal["tensor", "row", "column"] = "tensor",
) -> Flow[Tensor]:
    """Goes from the first expert to the second along the arc between them, as far as the second weighs.

    The arc is that of the whole tensor, or of each row or column by itself; a vector is one. Collinear
    ones are interpolated on the line. (3, 0) and (0, 4) of weights 1 and 1 make (2.1213, 2.8284).
    """
    vectors = deltas if space == "delta" else deltas + base
    start, end = vectors.double()
    products = torch.stack([start * start, start * end, end * end])
    one_row = base.shape[1] == (yield Size())
    if scope == "row":
        products = products.sum(2, keepdim=True)
    elif scope == "column" and not one_row:
        products = (yield Sum(products.sum(1))).unsqueeze(1)
    else:
        products = (yield Sum(products.sum((1, 2)))).view(3, 1, 1)
    lengths = (products[0] * products[2]).sqrt()
    angle = torch.where(lengths > 0, products[1] / lengths, 1).clamp(-1, 1).acos()
    sine = angle.sin()
    t = float(weight[1] / sum(weight))
    shares = torch.tensor([1 - t, t], dtype=angle.dtype, device=angle.device).view(2, 1, 1)
    merged = combined(vectors, torch.where(sine < 1e-7, shares, (shares * angle).sin() / sine))
    return merged if space == "delta" else merged - base
