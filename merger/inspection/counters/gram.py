"""Counters of inner products on the smaller side of a matrix, which all singular values and directions follow from.

Shapes: n matrices [r c], s = min(r, c) is the smaller side, d directions.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from merger._lazy import torch
from merger.inspection.counters import Counter, MatrixShape

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 2.0**-23
"""The relative size up to which a singular value is rounding of the float32 deltas, as in merger.ops.linalg."""


class GramCounter(Counter):
    """Adds up products of the columns of tall matrices over slices, in the order of rows: no sum depends on threads.

    The rows of wide matrices are held until all are there. Of vectors nothing is counted.
    """

    extra_matrices = 0  # beside one for each expert

    def __init__(self, shape: MatrixShape) -> None:
        super().__init__(shape)
        self.tall = shape.rows >= shape.columns
        self.count = shape.experts + self.extra_matrices
        height = 0 if self.tall or shape.is_vector else shape.rows
        self._wide = torch.zeros(self.count, height, shape.columns)
        self._next_row = 0
        self._early: dict[int, tuple[int, Any]] = {}  # slices before their turn, by first row: rows, and the terms

    @abstractmethod
    def matrices_of(self, piece: Any) -> Tensor:
        """The rows of the matrices in a slice: [n r c]."""

    @abstractmethod
    def terms_of(self, rows: Tensor) -> Any:
        """Returns what `add_terms` needs of some rows [n r c] of tall matrices; several threads at the same time."""

    @abstractmethod
    def add_terms(self, terms: Any) -> None:
        """Adds the products of some rows; one thread at a time, in the order of rows."""

    def measure(self, piece: Any) -> Any:
        """The terms of a slice of tall matrices, the rows of wide ones, nothing of vectors."""
        if self.shape.is_vector:
            return None
        rows = self.matrices_of(piece)
        return self.terms_of(rows) if self.tall else rows

    def add(self, piece: Any, measurement: Any) -> None:
        """Adds a slice as soon as all rows before it are added."""
        if self.shape.is_vector:
            return
        rows = piece.deltas.shape[1]
        if not self.tall:
            self._wide[:, piece.row : piece.row + rows] = measurement
            return
        self._early[piece.row] = rows, measurement
        while self._next_row in self._early:
            rows, terms = self._early.pop(self._next_row)
            self.add_terms(terms)
            self._next_row += rows

    def wide_matrices(self) -> Tensor:
        """The wide matrices [n r c], which the counter holds no longer."""
        matrices, self._wide = self._wide, torch.empty(0)
        return matrices


class JointGramCounter(GramCounter):
    """Adds up the products of every two of the matrices, in float64; one product at a time, which bounds the memory."""

    def __init__(self, shape: MatrixShape) -> None:
        super().__init__(shape)
        side = self.count * shape.columns if self.tall and not shape.is_vector else 0
        self._products = torch.zeros(side, side, dtype=torch.float64)

    def terms_of(self, rows: Tensor) -> Tensor:
        """The rows side by side, on the CPU: [r n c]."""
        return rows.transpose(0, 1).cpu()

    def add_terms(self, terms: Tensor) -> None:
        """Adds the products of each matrix with itself and with those after it."""
        self._add(terms.double().flatten(1), terms.shape[2])

    def grams(self) -> Tensor:
        """X_i' X_j of tall matrices X, X_i X_j' of wide ones: [n s n s]. The counter lets its memory go."""
        side = self.shape.columns if self.tall else self.shape.rows
        if not self.tall:
            self._products = torch.zeros(self.count * side, self.count * side, dtype=torch.float64)
            self._add(self.wide_matrices().flatten(0, 1).T.double(), side)
        upper, self._products = self._products.triu_(), torch.empty(0)
        upper += upper.triu(1).T
        return upper.view(self.count, side, self.count, side)

    def _add(self, rows: Tensor, side: int) -> None:
        """Adds the products of columns of ``rows`` [r n s] in the upper triangle of blocks."""
        for start in range(0, self.count * side, side):
            block = self._products[start : start + side, start:]
            block.addmm_(rows[:, start : start + side].T, rows[:, start:])


class Directions(NamedTuple):
    """The singular directions of a matrix on its smaller side, the strongest first."""

    vectors: Tensor  # [s d], orthonormal columns
    values: Tensor  # [d], positive


def directions(gram: Tensor, longer_side: int, rounding: float = 0.0) -> Directions:
    """The directions of a matrix with this Gram matrix [s s].

    Singular values up to `ROUNDING` times the longer side and the largest value, or up to ``rounding``, do not exist.
    """
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp(min=0).sqrt()
    largest = float(values[0]) if len(values) else 0.0
    existing = int((values > max(longer_side * ROUNDING * largest, rounding)).sum())
    return Directions(vectors.flip(1)[:, :existing], values[:existing])
