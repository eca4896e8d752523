"""Do not count twice what experts share. Singular value calibration, https://arxiv.org/abs/2602.05536, section 4.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.methods._spectral import untouched, weighted, whole
from merger.ops.linalg import svd
from merger.pipeline.parameters import Numbers, ShareOrAuto
from merger.pipeline.registry import filter_

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 2.0**-24
"""Share of a task vector's norm up to which what it has in an output direction is rounding."""


@filter_(exact=False, takes=whole, elsewhere=untouched)
def svc(
    deltas: Tensor, originals: Tensor, *, alpha: ShareOrAuto = "auto", weight: Numbers = 1, head: bool = False
) -> Tensor:
    """Rescales each singular value of the merged task vector by how often it counts what the experts have there.

    In the output direction u the merged task vector answers a = u^T tau and expert k answers a_k = u^T delta_k, which a
    counts s_k = <a, a_k> / |a_k|^2 times. The singular value is divided by the mean of max(`alpha`, s_k) over the
    experts that have an answer there. `auto` is 1 / K; at 1 no singular value grows. What is no matrix (and the head,
    tied or not, without `head`) stays as it was merged. (2, 0), the sum of (1, 0) twice, becomes (1, 0); (1, 1), the
    sum of (1, 0) and (0, 1), stays.
    """
    directions = svd(deltas)
    floor = 1 / len(originals) if alpha == "auto" else float(alpha)
    merged_answers = directions.values * directions.right  # [c d]
    times = torch.zeros_like(directions.values)
    experts = torch.zeros_like(times)
    for delta in weighted(originals, weight):
        answers = delta.T @ directions.left
        squares = answers.square().sum(0)
        answered = squares > ROUNDING**2 * delta.square().sum()
        counted = ((merged_answers * answers).sum(0) / squares.where(answered, 1)).clamp(min=floor)
        times += counted.where(answered, 0)
        experts += answered
    mean = times / experts.clamp(min=1)
    return directions._replace(values=directions.values / mean.where(mean > 0, 1)).product().to(deltas)
