"""Do not count twice what experts share. Singular value calibration, https://arxiv.org/abs/2602.05536, section 4.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.methods._spectral import ROUNDING, runs, untouched, weighted
from merger.ops.linalg import gram, right_directions, svd
from merger.ops.questions import Flow, MatrixSums, Size
from merger.pipeline.parameters import Numbers, ShareOrAuto
from merger.pipeline.registry import filter_

if TYPE_CHECKING:
    from torch import Tensor


@filter_(exact=False, takes=runs, elsewhere=untouched)
def svc(
    deltas: Tensor, originals: Tensor, *, alpha: ShareOrAuto = "auto", weight: Numbers = 1, head: bool = False
) -> Flow[Tensor]:
    """Rescales each singular value of the merged task vector by how often it counts what the experts have there.

    In the output direction u the merged task vector answers a = u^T tau and expert k answers a_k = u^T delta_k, which a
    counts s_k = <a, a_k> / |a_k|^2 times. The singular value is divided by the mean of max(`alpha`, s_k) over the
    experts that have an answer there. `auto` is 1 / K; at 1 no singular value grows. What is no matrix (and the head,
    tied or not, without `head`) stays as it was merged. (2, 0), the sum of (1, 0) twice, becomes (1, 0); (1, 1), the
    sum of (1, 0) and (0, 1), stays.
    """
    columns = deltas.shape[1]
    rows = (yield Size()) // columns
    floor = 1 / len(originals) if alpha == "auto" else float(alpha)
    if rows > columns:  # sums over the rows tell all but the directions of the rows themselves
        products, squares = yield MatrixSums(partial(_products, deltas, originals, weight))
        right, values = right_directions(products[0].to(deltas.device), rows)
        answers = (product.to(right) @ right / values for product in products[1:])
        counts = _counts(right * values, zip(answers, squares, strict=True), floor)
        return (deltas.double() @ (right / counts @ right.T)).to(deltas)
    directions = svd(deltas)
    experts = weighted(originals, weight)
    answers_and_squares = ((delta.T @ directions.left, delta.square().sum()) for delta in experts)
    counts = _counts(directions.right * directions.values, answers_and_squares, floor)
    return directions._replace(values=directions.values / counts).product().to(deltas)


def _products(deltas: Tensor, originals: Tensor, weight: Sequence[Fraction]) -> tuple[Tensor, Tensor]:
    """tau^T tau and delta_k^T tau [1+k c c] of the merged and the experts' task vectors, and |delta_k|^2 [k]."""
    merged = deltas.double()
    products = torch.empty(1 + len(originals), *[merged.shape[1]] * 2, dtype=torch.float64, device=merged.device)
    products[0] = gram(merged.T)
    squares = products.new_empty(len(originals))
    for k in range(len(originals)):
        exact = weighted(originals[k : k + 1], weight[k : k + 1])[0]
        products[1 + k], squares[k] = exact.T @ merged, exact.square().sum()
    return products, squares


def _counts(merged: Tensor, experts: Iterable[tuple[Tensor, Tensor]], floor: float) -> Tensor:
    """How often the merged answers [c d] count those of the experts, by direction [d]; 1 where no expert answers.

    ``experts`` are the answers [c d] of each and the square of its task vector.
    """
    total = merged.new_zeros(merged.shape[1])
    number = torch.zeros_like(total)
    for answers, square in experts:
        sizes = answers.square().sum(0)
        answered = sizes > ROUNDING**2 * square.to(sizes)
        count = ((merged * answers).sum(0) / sizes.where(answered, 1)).clamp(min=floor)
        total += count.where(answered, 0)
        number += answered
    mean = total / number.clamp(min=1)
    return mean.where(mean > 0, 1)
