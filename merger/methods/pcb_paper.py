"""Parameter competition balancing as the paper states it. PCB-Merging, https://arxiv.org/abs/2410.02396, section 3."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.arithmetic import keep, weighted_mean
from merger.ops.questions import Flow, Max, Size, Sum, Whole
from merger.ops.selection import select
from merger.pipeline.parameters import Shares
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False)
def pcb_paper(deltas: Tensor, *, density: Shares = 0.1, scope: Whole = "global") -> Flow[Tensor]:
    """Averages the `density` of each task vector that wins the competition, weighted by how clearly it wins.

    A parameter's score is softmax(K * N(delta^2)), how far it stands out in its own model, times the
    sum over all K experts of softmax(N(delta * theirs)), how well it goes with them. N maps the tensor
    or the model to [0, 1]. At 0.5, (4, 0) and (-1, 2) each keep the larger one: (4, 2).
    """
    experts = range(len(deltas))
    pairs = {pair: n for n, pair in enumerate(combinations_with_replacement(experts, 2))}
    products = (deltas[i].double() * deltas[j] for i, j in pairs)
    ends = yield Max(torch.stack([torch.stack([product.amax(), -product.amin()]) for product in products]), scope)
    span = ends.sum(1)

    def stands(i: int, j: int, sharpness: int = 1) -> Tensor:
        """The numerators of a softmax of N, at most 1."""
        n = pairs[i, j]
        above: Tensor = deltas[i].double() * deltas[j] - ends[n, 0]  # 0 at the highest
        return (above.div_(span[n] if span[n] else 1).mul_(sharpness)).exp_()

    unit = 2.0 ** (62 - (yield Size(scope)).bit_length())
    numerators = [*((i, j, 1) for i, j in pairs), *((i, i, len(deltas)) for i in experts)]
    # Whole numbers, because their sum does not depend on where slices end.
    counts = yield Sum(torch.stack([(stands(*product) * unit).round_().long().sum() for product in numerators]), scope)
    sums = dict(zip(numerators, (counts.double() / unit).tolist(), strict=True))
    score = torch.zeros_like(deltas, dtype=torch.float64)
    for i, j in pairs:
        share = stands(i, j) / sums[i, j, 1]
        for expert in {i, j}:
            score[expert] += share
    for i in experts:
        score[i] *= stands(i, i, len(deltas)) / sums[i, i, len(deltas)]
    mask = yield from select(score, density, scope=scope)
    balanced: Tensor = weighted_mean(deltas, keep(score, mask)).to(deltas)
    return balanced
