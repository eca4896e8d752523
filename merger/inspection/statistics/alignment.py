"""Subspace alignment ratio: how much of an expert's change lies in the directions of the merged change.

Iso-C and Iso-CTS (https://arxiv.org/abs/2502.04959), equations 5 and 6, with their tolerance of 0.05.

Shapes: k experts, r rows, c columns, s the smaller side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from merger._lazy import torch
from merger.inspection.counters import Floats, MergedSlice, Subject, Sums, as_tuples
from merger.inspection.counters.gram import JointGramCounter, directions
from merger.inspection.statistic import BY_EXPERT, floats, share, statistic

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 0.05
"""The share of the merged vector's norm that the directions which are looked at may leave."""


@dataclass(frozen=True)
class AlignmentSums(Sums):
    """Alignment ratios of each expert."""

    elements: int  # of the matrices
    ratios: Floats  # [k] times the elements of the matrix


class AlignmentCounter(JointGramCounter):
    """Finds the directions of the merged vector of a matrix, and the part of each task vector that lies in them."""

    subject: ClassVar[Subject] = "merged"
    extra_matrices = 1

    def matrices_of(self, piece: MergedSlice) -> Tensor:
        """Rows of the merged vector, then those of the task vectors: [1+k r c]."""
        return torch.cat([piece.delta.unsqueeze(0), piece.deltas])

    def sums(self) -> AlignmentSums:
        """The sums of one matrix; a vector has none."""
        if self.shape.is_vector:
            return AlignmentSums(0, (0.0,) * self.shape.experts)
        elements = self.shape.elements
        ratios = alignment_of(self.grams(), max(self.shape.rows, self.shape.columns), self.tall)
        return AlignmentSums(elements, as_tuples(ratios * elements))


def alignment_of(grams: Tensor, longer_side: int, tall: bool) -> Tensor:
    """‖Π δ‖ / ‖δ‖ of each expert [k], Π the projection on the left singular directions of the merged vector that count.

    ``grams`` [1+k s 1+k s] are of the merged vector and the experts. The left directions U are on the smaller side of a
    wide matrix; of a tall one Uᵀδ is Σ⁻¹Vᵀ Mᵀδ.
    """
    merged = directions(grams[0, :, 0], longer_side)
    energies = merged.values.square()
    residual = energies.flip(0).cumsum(0).flip(0)  # of direction i and those after it
    rank = int((residual > TOLERANCE**2 * energies.sum()).sum())
    vectors, values = merged.vectors[:, :rank], merged.values[:rank]
    experts = range(1, len(grams))
    if tall:
        squares = [(vectors.T @ grams[0, :, i] / values.view(-1, 1)).square().sum() for i in experts]
    else:
        squares = [((vectors.T @ grams[i, :, i]) * vectors.T).sum() for i in experts]
    norms = floats([float(grams[i, :, i].trace()) for i in experts]).sqrt()
    return share(torch.stack(squares).clamp(min=0).sqrt(), norms)


@statistic(
    subject="merged",
    form=BY_EXPERT,
    unit="share",
    formula="‖Π δ‖ / ‖δ‖, Π on the first k left singular vectors of M, ‖M - Π M‖ ≤ 0.05 ‖M‖",
    counters=[AlignmentCounter],
    order=50,
    view="result",
    request="subspaces",
    in_layers=True,
    worst=min,
)
def alignment(ratios: AlignmentSums) -> Tensor | None:
    """Subspace alignment ratio: the share of an expert's task vector, by length, that lies in the directions of the
    merged vector; mean over matrices by their size.
    """
    return share(floats(ratios.ratios), ratios.elements) if ratios.elements else None
