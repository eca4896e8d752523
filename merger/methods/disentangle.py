"""Take out what makes task vectors alike. AWD, https://arxiv.org/abs/2411.18729, equations 9 to 11 and algorithm 1.

See docs/methods/weighting.md.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from merger._lazy import torch
from merger.ops.arithmetic import summed
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.parameters import Number
from merger.pipeline.registry import sparsifier

if TYPE_CHECKING:
    from torch import Tensor

Descents = Annotated[int, Field(ge=0, le=100_000)]


@sparsifier(exact=False)
def disentangle(
    deltas: Tensor, *, alpha: Number = 0.1, rate: Number = 0.01, steps: Descents = 300, scope: Whole = "global"
) -> Flow[Tensor]:
    """Subtracts one vector from all task vectors, so that they come closer to orthogonal ones.

    It is found by `steps` steps of gradient descent at `rate` from zero on, and lowers the mean |cosine| between the
    experts plus `alpha` times the length of the vector; of all steps the one with the lowest loss counts. Task vectors
    are those of the whole model or, by `scope`, of one tensor. Orthogonal ones stay as they are.
    """
    products = partial(_products, deltas)
    descend = partial(_shares, alpha=float(alpha), rate=float(rate), steps=steps)
    shares = yield Sum(products, scope, descend)
    redundant = summed(deltas * shares.to(deltas).view(-1, 1, 1))
    return deltas - redundant


def _products(deltas: Tensor) -> Tensor:
    """The inner products of the task vectors, float64 [k k]."""
    vectors = deltas.double().flatten(1)
    return torch.stack([torch.stack([(vector * other_vector).sum() for other_vector in vectors]) for vector in vectors])


def _shares(products: Tensor, *, alpha: float, rate: float, steps: int) -> Tensor:
    """What the subtracted vector holds of each task vector [k], whose inner products [k k] are all it needs.

    Descent begins at zero, and each gradient is a combination of the task vectors, so it is the same among vectors [k]
    with these inner products.
    """
    squares, axes = torch.linalg.eigh(products)
    exists = squares > len(squares) * 2.0**-40 * squares[-1].clamp(min=0)
    lengths = squares.where(exists, 0).sqrt()
    vectors, redundant = axes * lengths, torch.zeros_like(lengths)
    lowest, best = float("inf"), redundant
    for _ in range(steps + 1):
        loss, gradient = _loss_and_gradient(vectors, redundant, alpha)
        if loss < lowest:
            lowest, best = loss, redundant
        redundant = redundant - rate * gradient
    shares: Tensor = axes @ torch.where(exists, best / lengths, 0)
    return shares


def _loss_and_gradient(vectors: Tensor, redundant: Tensor, alpha: float) -> tuple[float, Tensor]:
    """The loss where a vector [k] is subtracted from these [k k], one a row, and its gradient."""
    with torch.enable_grad():
        subtracted = redundant.clone().requires_grad_()
        rests = vectors - subtracted
        lengths = torch.linalg.vector_norm(rests, dim=1)
        directions = rests / lengths.where(lengths > 0, 1)[:, None]
        pairs = torch.combinations(torch.arange(len(vectors)))
        cosines = (directions[pairs[:, 0]] * directions[pairs[:, 1]]).sum(1).abs()
        loss = cosines.sum() / max(1, len(pairs)) + alpha * torch.linalg.vector_norm(subtracted)
        (gradient,) = torch.autograd.grad(loss, subtracted)
    return float(loss.detach()), gradient
