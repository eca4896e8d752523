"""Adaptive projective gradient descent on a change that all share. DOGE, https://arxiv.org/abs/2501.01230.

See docs/methods/weighting.md.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from merger._lazy import torch
from merger.methods._spectral import left_at_base, whole
from merger.ops.arithmetic import keep, summed
from merger.ops.linalg import side_by_side, svd
from merger.ops.questions import Flow, Scope
from merger.ops.selection import select
from merger.pipeline.parameters import Number, Share, Shares
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


def _check(*, eta: Fraction, rate: Fraction, **_: object) -> None:
    if eta <= 0 or rate <= 0:
        raise ValueError("eta and rate: expected a number above 0, for at 0 nothing is merged or learned")


@merger(exact=False, takes=whole, check=_check, elsewhere=left_at_base)
def doge(
    deltas: Tensor,
    *,
    eta: Number = 0.07,
    span: Share = "1/6",
    density: Shares = 0.3,
    steps: Annotated[int, Field(ge=0, le=100_000)] = 400,
    rate: Number = 1e-4,
    scope: Scope = "global",
    head: bool = False,
) -> Flow[Tensor]:
    """Adds task vectors of equal norm, and to each the same change, which lowers what they interfere with each other.

    A task vector counts `eta` over its norm. `steps` steps of Adam at `rate` look for the change, outside of the
    `span` strongest output directions of all experts together, where they are not to be disturbed. Of each task
    vector the `density` largest positions are taken, ranked over the whole model or by `scope`. What is no matrix (and
    the head, tied or not, without `head`) stays at the base.
    """
    norms = torch.linalg.matrix_norm(deltas.double())
    factors = torch.where(norms > 0, float(eta) / norms.where(norms > 0, 1), 0).to(deltas).view(-1, 1, 1)
    masks = yield from select(deltas.abs(), density, scope=scope)
    change = _change(deltas, factors, float(span), steps, float(rate)) if steps else torch.zeros_like(deltas[0])
    return summed(keep((deltas + change) * factors, masks))


def _change(deltas: Tensor, factors: Tensor, span: float, steps: int, rate: float) -> Tensor:
    """The change [r c] that all experts get: lower is the sum of <delta_j, delta_j - merged>^2 over rows and experts.

    ``factors`` [k 1 1] are what a task vector counts; ``merged`` is the sum of task vector plus change by these.
    """
    directions, total = _directions(deltas, span), float(factors.sum())
    interference = (deltas * (deltas - summed(deltas * factors))).sum(
        2, keepdim=True
    )  # <delta_j, delta_j - merged> at first
    change = torch.zeros_like(deltas[0])
    optimizer = torch.optim.Adam([change], lr=rate)
    for _ in range(steps):
        products = interference - total * (deltas * change).sum(2, keepdim=True)
        gradient = summed(deltas * products).mul_(-2 * total)
        change.grad = gradient - directions @ (directions.T @ gradient)
        optimizer.step()
    return change


def _directions(deltas: Tensor, span: float) -> Tensor:
    """The ``span`` strongest output directions [r s] of the experts' strongest 1/K together."""
    full = min(deltas.shape[1:])
    parts = [svd(delta, rank=full // len(deltas)) for delta in deltas]
    return svd(side_by_side(parts).left, rank=int(full * span)).left.to(deltas)
