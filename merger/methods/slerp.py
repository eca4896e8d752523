"""Spherical interpolation of two models. https://dl.acm.org/doi/10.1145/325165.325242; docs/methods/averages.md."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.parameters import Share
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False, experts=2)
def slerp(
    deltas: Tensor,
    base: Tensor,
    *,
    t: Share = 0.5,
    space: Literal["delta", "weights"] = "delta",
    scope: Whole = "tensor",
) -> Flow[Tensor]:
    """Goes the share `t` of the way from the first expert to the second along the arc between them.

    The arc is that of the task vectors or of the weights themselves, its angle the tensor's or the
    whole model's. Nearly parallel or vanishing vectors are interpolated on the line.
    (3, 0) and (0, 4) at t = 0.5 make (2.1213, 2.8284).
    """
    if t in (0, 1):
        return deltas[int(t)]
    vectors = deltas if space == "delta" else deltas + base
    flat = vectors.flatten(1).double()
    (aa, ab), (_, bb) = (yield Sum(flat @ flat.T, scope)).tolist()
    amount, norms = float(t), math.sqrt(aa) * math.sqrt(bb)
    if min(aa, bb) >= 1e-16 and abs(ab) <= 0.9995 * norms:
        angle = math.acos(ab / norms)
        start, end = (math.sin(share * angle) / math.sin(angle) for share in (1 - amount, amount))
        merged = vectors[0] * start + vectors[1] * end
    else:  # from the first on, so that equal weights come back bit for bit
        merged = vectors[0] + (vectors[1] - vectors[0]) * amount
    return merged if space == "delta" else merged - base
