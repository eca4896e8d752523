"""Singular values and vectors of one matrix, with conventions that make them functions of the input.

All of it is float64: a matrix of deltas is float32, and what is merged of it is rounded once more to
that. Directions whose singular value is at most ``tolerance`` of the largest do not exist here, so no
arbitrary vector of a null space enters a result (docs/methods/spectral.md).

The factors come from the eigenvectors of the smaller side's Gram matrix. Squaring costs half of the
digits: against LAPACK's SVD the relative error of a singular value is about eps / tolerance^2 at worst,
and at most 5e-9 as measured from 192x576 to 1536x1536, on normal deviates, on values that decay to
1e-6 of the largest and on rank 16. A float32 SVD of the same is wrong by up to 1e-3 and takes as long
(1.3 s against 1.3 s at 1536x1536 on one core, 0.2 against 0.1 at 576x1536; float64: 2.5 and 0.35).
Below ``SMALL`` the tolerance is so fine that the squares do not hold it, and LAPACK's SVD is taken.
Polar factors need no singular vectors of the larger side at all, and what two of them stand around is multiplied
from the inside, where matrices are small. Iterations for them (Newton-Schulz,
Halley by Cholesky factors) take five to ten rounds of some five products of matrices at the condition
numbers of task vectors, where the eigenvectors cost as much as seven products (1536x1536).

A matrix of low rank, as adapters make, is recognised by a sketch of ``SKETCH`` columns, and its factors
are those of a few rows: 0.05 s where the eigenvectors of 2048 rows take 3.

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

SKETCH = 80
"""Columns of a sketch that tells a matrix of low rank: an adapter of rank 64, or several smaller, and some to spare."""


CLOSE = 1e-4
"""Share of what is left that one more subspace iteration must gain to be followed by another."""


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
    """Concatenates the directions of matrices, which stay orthonormal only within each matrix."""
    left, values, right = zip(*parts, strict=True)
    return Factors(torch.cat(left, 1), torch.cat(values), torch.cat(right, 1))


def tolerance(matrix: Tensor) -> float:
    """The share of the largest singular value up to which another one is rounding: max(m, n) * 2^-23."""
    return float(max(matrix.shape)) * 2.0**-23


def gram(rows: Tensor) -> Tensor:
    """rows @ rows.T, each product of two rows computed once: two thirds of the time of the whole."""
    height = len(rows)
    squares, step = rows.new_empty(height, height), max(64, -(-height // 4))
    for i in range(0, height, step):
        block = rows[i:] @ rows[i : i + step].T
        squares[i:, i : i + step] = block
        squares[i : i + step, i:] = block.T
    return squares


def svd(matrix: Tensor, *, rank: int | None = None, rounding: float = 0.0) -> Factors:
    """Returns the ``rank`` strongest directions of a matrix [m n] of any float dtype, by default all directions.

    ``rounding`` bounds the singular values that are rounding errors of a matrix that is a small difference of larger
    ones; directions up to this bound are omitted.
    """
    wide, tall = _laid_wide(matrix)
    span = _span(wide)
    rows = wide if span is None else span.T @ wide
    short, values = _short_side(rows, rounding)
    short, values = short[:, :rank], values[:rank]
    long = rows.T @ short / values
    short = short if span is None else span @ short
    left, right = (long, short) if tall else (short, long)
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return Factors(left * signs, values, right * signs)


def right_directions(squares: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The existing right singular vectors [n r] of a matrix of so many rows, and their values [r], the strongest first.

    ``squares`` [n n] is the Gram matrix of its columns, float64.
    """
    share = max(rows, len(squares)) * 2.0**-23
    span = _span_of_squares(squares, share)
    values, vectors = torch.linalg.eigh(squares if span is None else span.T @ squares @ span)
    values, vectors = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    existing = int((values > share * values[0]).sum())
    vectors = vectors[:, :existing]
    return (vectors if span is None else span @ vectors), values[:existing]


def _span_of_squares(squares: Tensor, share: float) -> Tensor | None:
    """As `_span`, of a matrix whose Gram matrix this is, and whose singular values exist above ``share``."""
    if len(squares) < max(SMALL, 2 * SKETCH):
        return None
    random = torch.Generator().manual_seed(0)
    draws = torch.randn(len(squares), SKETCH, generator=random).to(squares)
    for rows in (squares[: 2 * SKETCH], squares):  # some rows tell it of most matrices
        sketch = rows @ draws
        spread = torch.linalg.svdvals(sketch)
        if spread[-1] > share**2 * spread[0]:
            return None
    span, _ = torch.linalg.qr(sketch)
    in_span = (span * (squares @ span)).sum()
    return span if squares.trace() - in_span <= (share / 10) ** 2 * in_span / SKETCH else None


def _laid_wide(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrix in float64 with no more rows than columns, and whether it was turned for that."""
    tall = matrix.shape[0] > matrix.shape[1]
    return (matrix.double().T if tall else matrix.double()), tall


def _short_side(wide: Tensor, rounding: float = 0.0) -> tuple[Tensor, Tensor]:
    """The existing singular vectors [m r] of the shorter side, and their values [r]; the strongest first."""
    if max(wide.shape) < SMALL:
        vectors, values, _ = torch.linalg.svd(wide, full_matrices=False)
    else:
        squares, vectors = torch.linalg.eigh(gram(wide))
        values, vectors = squares.flip(0).clamp_(min=0).sqrt_(), vectors.flip(1)
    largest = float(values[0]) if len(values) else 0.0
    existing = int((values > max(tolerance(wide) * largest, rounding)).sum())
    return vectors[:, :existing], values[:existing]


def _span(wide: Tensor) -> Tensor | None:
    """Orthonormal columns [m s] that hold all of a matrix of low rank, or None where it is not of low rank.

    A randomised range finder (Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061) with a fixed
    seed. It is believed only where what is left outside its span is, in the Frobenius norm, at most a tenth of
    what `tolerance` lets exist, so no direction that exists is lost; for a float32 product of two factors
    it is a thousand times less.
    """
    height, width = wide.shape
    if max(wide.shape) < SMALL or height < 2 * SKETCH:
        return None
    random = torch.Generator().manual_seed(0)
    draws = torch.randn(width, SKETCH, generator=random).to(wide)  # float64 ones take five times as long to draw
    if _independent(wide[: 2 * SKETCH] @ draws, wide):  # some rows tell it of most matrices
        return None
    sketch = wide @ draws
    if _independent(sketch, wide):
        return None
    span, _ = torch.linalg.qr(sketch)
    in_span = (span.T @ wide).square().sum()
    out_of_span = (wide.square().sum() - in_span).clamp(min=0)
    largest = in_span / SKETCH  # at most the square of the largest singular value
    return span if out_of_span <= (tolerance(wide) / 10) ** 2 * largest else None


def _independent(sketch: Tensor, matrix: Tensor) -> bool:
    """Whether all columns of a sketch have directions of their own that exist in ``matrix``."""
    spread = torch.linalg.eigvalsh(sketch.T @ sketch)
    return bool(spread[0] > tolerance(matrix) ** 2 * spread[-1])


def decorrelated(directions: Factors) -> Tensor:
    """The matrix [m n] of ``directions`` turned, as little as it takes, until no two of a side overlap.

    That is P * values @ Q.T, where P and Q are the nearest to ``left`` and ``right`` of those with orthonormal columns
    (the polar factors, over existing directions). Only what is no larger than [r r] is ever inverted.
    """
    left, values, right = directions
    middle = _inverse_root(left) * values @ _inverse_root(right)
    product: Tensor = torch.linalg.multi_dot([left, middle, right.T])
    return product


def _inverse_root(columns: Tensor) -> Tensor:
    """(columns.T @ columns)^(-1/2), over existing directions: ``columns`` times it is their polar factor."""
    short, values = _short_side(columns.T)
    return gram(short / values.sqrt())


def isotropic(matrix: Tensor) -> Tensor:
    """The matrix [m n] with the mean of its singular values for each that exists."""
    wide, tall = _laid_wide(matrix)
    span = _span(wide)
    rows = wide if span is None else span.T @ wide
    short, values = _short_side(rows)
    rotated = gram(short / values.sqrt()) @ rows
    rotated = rotated if span is None else span @ rotated
    flat = rotated * values.mean() if len(values) else rotated
    return flat.T if tall else flat


def strongest(matrix: Tensor, rank: int) -> Factors:
    """About the ``rank`` strongest directions of a matrix [m n], where few are wanted of many: by subspace iteration.

    What they leave of the matrix is at most ``CLOSE`` longer than the least possible, judged by how much the last
    iteration still gained; exact where ``rank`` is a fifth of all directions or more.
    """
    wide, tall = _laid_wide(matrix)
    columns = rank + max(10, rank // 4)
    if max(wide.shape) < SMALL or 5 * columns > len(wide):
        return svd(matrix, rank=rank)
    random = torch.Generator().manual_seed(0)
    draws = torch.randn(columns, wide.shape[1], generator=random, dtype=torch.float64).to(wide.device)
    total, previous, rows = wide.square().sum(), wide.new_zeros(()), draws
    while True:
        span, _ = torch.linalg.qr(wide @ rows.T)
        rows = span.T @ wide
        short, values = _short_side(rows)
        energy = values[:rank].square().sum()
        if energy - previous <= CLOSE * (total - energy):
            break
        previous = energy
    short, values = short[:, :rank], values[:rank]
    short, long = span @ short, rows.T @ short / values
    return Factors(long, values, short) if tall else Factors(short, values, long)


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """The nearest float64 matrix of at most that rank; the matrix itself where its rank is no more."""
    factors = svd(matrix, rank=rank + 1)
    return matrix.double() if len(factors.values) <= rank else factors.first(rank).product()
