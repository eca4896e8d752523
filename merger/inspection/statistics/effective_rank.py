"""Effective rank: how many directions a task vector's matrix uses.

Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

Shapes: k experts, r rows, c columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.inspection.counters import ExpertSlice, Floats, MatrixShape, Sums, as_tuples
from merger.inspection.counters.gram import ROUNDING, GramCounter
from merger.inspection.statistic import BY_EXPERT, floats, share, statistic

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RankSums(Sums):
    """Effective ranks of each expert."""

    elements: int  # of the matrices that have ranks
    ranks: Floats  # [k] times the elements of the matrix


class RankCounter(GramCounter):
    """Adds up the Gram matrix of each task vector's columns, which has the same singular values as the matrix."""

    def __init__(self, shape: MatrixShape) -> None:
        super().__init__(shape)
        side = shape.columns if self.tall and not shape.is_vector else 0
        self._grams = torch.zeros(self.count, side, side, dtype=torch.float64)

    def matrices_of(self, piece: ExpertSlice) -> Tensor:
        """Rows of the task vectors [k r c]."""
        return piece.deltas

    def terms_of(self, rows: Tensor) -> Tensor:
        """The Gram matrices of some rows [k c c]."""
        wide = rows.double()
        return (wide.transpose(1, 2) @ wide).cpu()

    def add_terms(self, terms: Tensor) -> None:
        """Adds Gram matrices [k c c]."""
        self._grams += terms

    def sums(self) -> RankSums:
        """The effective rank of each expert's matrix, 0 of a zero matrix; vectors have none."""
        if self.shape.is_vector:
            return RankSums(0, (0.0,) * self.shape.experts)
        matrices = self._grams if self.tall else self.wide_matrices()
        ranks = torch.stack([entropy_rank(self._singular_values(matrix)) for matrix in matrices])
        return RankSums(self.shape.elements, as_tuples(ranks * self.shape.elements))

    def _singular_values(self, matrix: Tensor) -> Tensor:
        wide = matrix.double()
        squares: Tensor = torch.linalg.eigvalsh(wide if self.tall else wide @ wide.T)
        values = squares.clamp(min=0).sqrt()
        tolerance = max(self.shape.rows, self.shape.columns) * ROUNDING
        return values.where(values > tolerance * float(values.max()), 0)


def entropy_rank(values: Tensor) -> Tensor:
    """e to the entropy of singular values [n] as shares of their sum; 0 where all are 0."""
    total = values.sum()
    if total == 0:
        return total
    shares = values[values > 0] / total
    return (-(shares * shares.log()).sum()).exp()


@statistic(
    form=BY_EXPERT,
    unit="number",
    formula="exp(-Σ p_i ln p_i), p_i = σ_i / Σ σ",
    counters=[RankCounter],
    order=68,
    view="task_vectors",
    request="rank",
    in_layers=True,
)
def effective_rank(ranks: RankSums) -> Tensor | None:
    """e to the entropy of a matrix's singular values as shares of their sum; mean over matrices by their size."""
    return share(floats(ranks.ranks), ranks.elements) if ranks.elements else None
