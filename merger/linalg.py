"""Singular values and vectors of one matrix, with conventions that make them functions of the input.

All of it is float64: a matrix of deltas is float32, and what is merged of it is rounded once more to
that. Directions whose singular value is at most ``tolerance`` of the largest do not exist here, so no
arbitrary vector of a null space enters a result (methods.md 7).

The factors come from the eigenvectors of the smaller side's Gram matrix. Squaring costs half of the
digits: against LAPACK's SVD the relative error of a singular value is about eps / tolerance^2 at worst,
and at most 5e-9 as measured from 192x576 to 1536x1536, on normal deviates, on values that decay to
1e-6 of the largest and on rank 16. A float32 SVD of the same is wrong by up to 1e-3 and takes as long
(1.3 s against 1.3 s at 1536x1536 on one core, 0.2 against 0.1 at 576x1536; float64: 2.5 and 0.35).
Below ``SMALL`` the tolerance is so fine that the squares do not hold it, and LAPACK's SVD is taken.

Shapes: m rows, n columns, r directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 256
"""Longer side from which on the Gram matrix is enough: eps / tolerance^2 is 2e-7 there."""


class Factors(NamedTuple):
    """The directions of a matrix, the strongest first; ``left * values @ right.T`` is the matrix."""

    left: Tensor  # [m r], orthonormal columns, the largest entry of each positive
    values: Tensor  # [r], positive
    right: Tensor  # [n r], orthonormal columns

    def product(self) -> Tensor:
        """The matrix [m n] that these directions make."""
        return self.left * self.values @ self.right.T

    def first(self, rank: int) -> Factors:
        """The ``rank`` strongest of them."""
        return Factors(self.left[:, :rank], self.values[:rank], self.right[:, :rank])


def side_by_side(parts: Sequence[Factors]) -> Factors:
    """The directions of several matrices as one list; orthonormal only within each."""
    left, values, right = zip(*parts, strict=True)
    return Factors(torch.cat(left, 1), torch.cat(values), torch.cat(right, 1))


def tolerance(matrix: Tensor) -> float:
    """The share of the largest singular value up to which another one is rounding: max(m, n) * 2^-23."""
    return float(max(matrix.shape)) * 2.0**-23


def svd(matrix: Tensor, *, rank: int | None = None, rounding: float = 0.0) -> Factors:
    """The ``rank`` strongest directions of a matrix [m n] of any float dtype, or all that it has.

    ``rounding`` is the size of a singular value that comes of the matrix's own making, where it is the
    small difference of larger ones; directions up to it do not exist either.
    """
    matrix = matrix.double()
    tall = matrix.shape[0] > matrix.shape[1]
    wide, least = matrix.T if tall else matrix, tolerance(matrix)
    if max(matrix.shape) < SMALL:
        near, values, far = torch.linalg.svd(wide, full_matrices=False)
        kept = _existing(values, least, rounding, rank)
        near, far = near[:, :kept], far[:kept].T
    else:
        squares, vectors = torch.linalg.eigh(wide @ wide.T)
        values = squares.flip(0).clamp_(min=0).sqrt_()
        kept = _existing(values, least, rounding, rank)
        near = vectors.flip(1)[:, :kept]
        far = wide.T @ near / values[:kept]
    left, right = (far, near) if tall else (near, far)
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return Factors(left * signs, values[:kept], right * signs)


def _existing(values: Tensor, least: float, rounding: float, rank: int | None) -> int:
    """How many of these descending singular values are more than rounding, at most ``rank``."""
    largest = float(values[0]) if len(values) else 0.0
    existing = int((values > max(least * largest, rounding)).sum())
    return existing if rank is None else min(rank, existing)


def polar(columns: Tensor) -> Tensor:
    """The orthonormal columns nearest to these [m r]: P @ Q.T for P * d @ Q.T, over the existing directions."""
    left, _, right = svd(columns)
    return left @ right.T


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """The nearest float64 matrix of at most that rank; the matrix itself where its rank is no more."""
    factors = svd(matrix, rank=rank + 1)
    return matrix.double() if len(factors.values) <= rank else factors.first(rank).product()
