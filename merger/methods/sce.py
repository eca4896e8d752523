"""Select, calculate, erase: weights from the variance between experts. FuseChat, https://arxiv.org/abs/2408.07990.

A matrix whose mean squares are all exactly 0 is weighted evenly; mergekit does so where they add up to less
than 1e-6, as those of ordinary fine-tunes do.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.arithmetic import keep, mean_of_agreeing, summed
from merger.ops.questions import Flow, Size, Sum
from merger.ops.selection import select
from merger.pipeline.parameters import Share
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


def _nothing_differs(experts: int, select_topk: Fraction, **_: object) -> str:
    return "one expert differs from no other, so all stays at the base" if experts == 1 and select_topk < 1 else ""


@merger(exact=False, remark=_nothing_differs)
def sce(
    deltas: Tensor,
    *,
    select_topk: Share = 0.1,
    select_in_merge: bool = True,
    even_below: Share = 0,
) -> Flow[Tensor]:
    """Merges, where experts differ most, those that agree in sign, each weighted by its mean square there.

    Of the positions where the experts differ the `select_topk` of highest variance take part; 1 takes
    all positions. `select_in_merge: false` uses that choice for the weights alone, as the authors'
    code does. Experts whose mean squares add up to no more than `even_below` weigh the same.
    At 1, (4, -3) and (2, 4) weigh 25 and 20, and make (3.111, 4).
    """
    selection = deltas
    if select_topk < 1:
        variance = _variance(deltas).unsqueeze(0)
        selected = yield from select(variance, [select_topk], eligible=variance > 0, ratio_of="remaining")
        selection = keep(deltas, selected)
    squares = yield Sum(selection.double().square().sum((1, 2)))
    weights = squares if squares.sum() > float(even_below) * (yield Size()) else torch.ones_like(squares)
    merged = selection if select_in_merge else deltas
    elected = (summed(merged) >= 0).to(merged) * 2 - 1
    return mean_of_agreeing(merged, elected, (weights / weights.sum()).to(merged).view(-1, 1, 1))


def _variance(deltas: Tensor) -> Tensor:
    """The population variance over the experts, exactly 0 where all are equal: float64 [r c]."""
    deviations = deltas.double() - deltas[0]
    deviations -= summed(deviations) / len(deviations)
    return summed(deviations.square_()) / len(deviations)
