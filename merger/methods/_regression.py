"""Least squares with a target for what the evidence leaves open: RegMean, FeatCal and WUDI solve it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from merger._lazy import torch
from merger.ops.questions import Flow, Sum

if TYPE_CHECKING:
    from torch import Tensor

Filter = Literal["ridge", "exp", "rank"]
RIDGE = 1e-6
"""What is added to the diagonal, as a share of its mean, where evidence and ridge leave some direction open."""


class Evidence:
    """Sums over experts of their Gram matrices C_k [c c], and of their task vectors delta_k [r c] times these.

    Products are of differences from the first task vector, so that equal ones come back bit for bit. All is float64.
    """

    def __init__(self, first: Tensor) -> None:
        self.first = first
        self.total = first.new_zeros(first.shape[1], first.shape[1])
        self.products = torch.zeros_like(first)

    def add(self, delta: Tensor, gram: Tensor, drift: Tensor | None = None) -> None:
        """Adds one expert.

        ``drift`` [r c] is what its outputs on other inputs y add to the products: weights times E[(y - x) x^T].
        """
        self.total += gram
        if delta is not self.first:  # it differs from itself by nothing, and these products take most of the time
            self.products += (delta - self.first) @ gram
        if drift is not None:
            self.products += drift

    def fit(self, target: Tensor) -> Flow[float]:
        """Asks for the factor on the whole matrix of ``target`` [r c] that brings it closest to the evidence.

        That is the s at which sum_k ||(s target - delta_k) C_k^(1/2)||^2 is least; 1 where there is no evidence on it.
        """
        weighed = target @ self.total
        overlap = (weighed * self.first).sum() + (target * self.products).sum()
        overlap, size = yield Sum(torch.stack([overlap, (target * weighed).sum()]))
        return float(overlap / size) if size > 0 else 1.0

    def solve(self, target: Tensor, ridge: float, filter_: Filter = "ridge") -> Tensor:
        """Returns the task vector [r c] of least squared error, which goes to ``target`` where evidence is small.

        An eigenvalue e of sum_k C_k counts as e / (e + ridge) of evidence; with `exp` as 1 - exp(-e / ridge), which is
        gradient descent stopped early; with `rank` fully above the ridge and not at all below it.
        """
        if filter_ == "ridge":
            return self._solve_with_ridge(target, ridge)
        values, vectors = torch.linalg.eigh(self.total)
        values = values.clamp(min=0)
        gain = -torch.expm1(-values / ridge) if filter_ == "exp" else (values > ridge).to(values)
        inverse = vectors * (gain / values.where(gain > 0, 1)) @ vectors.T
        return target + (self.products + (self.first - target) @ self.total).mm(inverse)

    def _solve_with_ridge(self, target: Tensor, ridge: float) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(_with_ridge(self.total, ridge))
        if failed:
            ridge += RIDGE * float(self.total.diagonal().mean())
            factor = torch.linalg.cholesky(_with_ridge(self.total, ridge))
        difference = self.products + ridge * (target - self.first)
        return self.first + torch.cholesky_solve(difference.T, factor).t()


def _with_ridge(matrix: Tensor, ridge: float) -> Tensor:
    definite = matrix.clone()
    definite.diagonal().add_(ridge)
    return definite
