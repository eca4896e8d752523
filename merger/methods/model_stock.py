"""How far to go from the base to the mean, told from the angles. Model Stock, https://arxiv.org/abs/2403.19522.

For three experts and more it is the cosines that are averaged, as in mergekit, and not the angles.
"""

from __future__ import annotations

from itertools import combinations, combinations_with_replacement
from typing import TYPE_CHECKING, Literal

from merger._lazy import torch
from merger.methods.mean import mean
from merger.ops.arithmetic import summed
from merger.ops.questions import Flow, Size, Sum
from merger.pipeline.registry import Takes, merger

if TYPE_CHECKING:
    from torch import Tensor


def _takes(scope: str, **_: object) -> Takes:
    return "slice" if scope == "tensor" else "rows"


@merger(takes=_takes, exact=False, fewest=2)
def model_stock(
    deltas: Tensor, *, scope: Literal["tensor", "row", "column"] = "tensor", clamp: bool = False
) -> Flow[Tensor]:
    """The mean task vector times t = K c / (1 + (K - 1) c), where c is the mean cosine between experts.

    Parallel task vectors go all the way to their mean, orthogonal ones nowhere; `clamp` keeps t
    within [0, 1] where they are opposed. Angles are those of the tensor, or of each row or column by
    itself; a vector is one. (1, 0) and (1, 1) have c = 0.7071, t = 0.8284: (0.8284, 0.4142).
    """
    experts = range(len(deltas))
    pairs = list(combinations_with_replacement(experts, 2))
    one_row = deltas.shape[-1] == (yield Size())
    over = {"row": (1,), "column": (1,) if one_row else (0,), "tensor": (0, 1)}[scope]
    products = torch.stack([(deltas[i].double() * deltas[j]).sum(over, keepdim=True) for i, j in pairs])
    if 0 in over:
        products = yield Sum(products)
    inner = dict(zip(pairs, products, strict=True))  # of each pair: [r 1], [1 c], or [1 1] for the whole tensor
    cosines = []
    for i, j in combinations(experts, 2):
        lengths = inner[i, i].sqrt() * inner[j, j].sqrt()
        cosines.append(torch.where(lengths > 0, inner[i, j] / lengths, 0))
    cosine = summed(torch.stack(cosines)) / len(cosines)
    spread = 1 + (len(deltas) - 1) * cosine
    t = torch.where(spread > 1e-3, len(deltas) * cosine / spread, 0)
    return mean(deltas, weight=[1] * len(deltas)) * (t.clamp(0, 1) if clamp else t).to(deltas)
