"""Regression of the experts' outputs. RegMean, https://arxiv.org/abs/2212.09849, section 4; docs/methods/weighting.md.

With `inputs: merged` it is RegMean++, https://arxiv.org/abs/2508.03121.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from merger._lazy import torch
from merger.methods._spectral import averaged, whole
from merger.methods.mean import mean
from merger.methods.regmean_diag import a_share_each
from merger.pipeline.parameters import Number, Numbers, Share
from merger.pipeline.registry import Stage, merger

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-6
"""What is added to the diagonal, as a share of its mean, where the Gram matrices leave some direction open."""


def _averaged(kind: str, *, weight: Any, lambda_: Any, **_: object) -> list[Stage] | None:
    return averaged(kind, head=True, weight=weight, lambda_=lambda_)


def _inputs(*, inputs: str, **_: object) -> Mapping[str, str]:
    return {"gram": "merged_gram" if inputs == "merged" else "gram"}


@merger(exact=False, takes=whole, inputs=_inputs, check=a_share_each, elsewhere=_averaged)
def regmean(
    deltas: Tensor,
    gram: Tensor | None,
    *,
    alpha: Share = 0.9,
    inputs: Literal["own", "merged"] = "own",
    weight: Numbers = 1,
    lambda_: Number = 1,
) -> Tensor:
    """The weights whose outputs come closest, in the least squares, to each expert's on its own inputs.

    With G_k = E[x x^T] [c c] of expert k, of which `alpha` keeps that share of what is off the diagonal:
    (sum of delta_k G_k) (sum of G_k)^-1, in float64. At `alpha` 0 it is the mean of every column weighted
    by E[x_j^2]. An expert that no input reached has no say; where none was reached it is the plain mean,
    as it is for embeddings, norms and biases. Needs calibration text; the Gram matrices of a block are
    made and used before those of the next, so none are kept. With `inputs: merged` an expert's text comes to
    its block through the merged blocks before it, and not through its own.
    """
    if gram is None or not gram.any():
        return mean(deltas, weight=weight) * float(lambda_)
    first = deltas[0].double()
    total, products = torch.zeros_like(gram[0], dtype=torch.float64), torch.zeros_like(first)
    for number, (delta, expert_gram, share) in enumerate(zip(deltas, gram, weight, strict=True)):
        shrunk = expert_gram.to(torch.float64, copy=True).mul_(float(alpha))
        shrunk.diagonal().copy_(expert_gram.diagonal())
        total += shrunk.mul_(float(share))
        if number:  # the first differs from itself by nothing, and these products take most of the time
            products += (delta.double() - first) @ shrunk
    # from the first on, so that equal task vectors come back bit for bit
    merged: Tensor = first + torch.cholesky_solve(products.T, _factor(total)).T
    return (merged * float(lambda_)).to(deltas)


def _factor(total: Tensor) -> Tensor:
    """The Cholesky factor, of a matrix that is made positive definite if it is not."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        ridge = RIDGE * total.diagonal().mean()
        factor = torch.linalg.cholesky(total + ridge * torch.eye(len(total), dtype=total.dtype, device=total.device))
    return factor
