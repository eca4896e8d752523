"""Subspaces of the task vectors: how far the experts' singular directions interfere, and how few of them would do.

Singular task interference is TSV's (https://arxiv.org/abs/2412.00081); row space interference I(k) and reconstruction
error R(k) are CART's (https://arxiv.org/abs/2412.12153), of task vectors centred on their mean.

Shapes: K experts, s the smaller side of a matrix, d directions; k is a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.inspection.counters import ExpertSlice, Floats, Sums
from merger.inspection.counters.gram import ROUNDING, Directions, JointGramCounter, directions
from merger.inspection.statistic import NUMBER, SERIES, Array, Axis, array, share, statistic

if TYPE_CHECKING:
    from torch import Tensor

RANK_SHARES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0)
"""Ranks k as shares of the smaller side of a matrix; CART's default is 0.08."""
RANK_AXIS = Axis("rank", lambda experts: RANK_SHARES)


@dataclass(frozen=True)
class SubspaceSums(Sums):
    """Interference and reconstruction error of matrices; interference is multiplied by the matrix's elements."""

    elements: int  # of the matrices
    task_interference: float
    row_interference: Floats  # at each of `RANK_SHARES`
    reconstruction_error: Floats  # likewise


class SubspaceCounter(JointGramCounter):
    """Finds the directions of the task vectors of a matrix, and of the same centred on their mean."""

    def matrices_of(self, piece: ExpertSlice) -> Tensor:
        """Rows of the task vectors [K r c]."""
        return piece.deltas

    def sums(self) -> SubspaceSums:
        """The sums of one matrix; a vector has none."""
        if self.shape.is_vector:
            zeros = (0.0,) * len(RANK_SHARES)
            return SubspaceSums(0, 0.0, zeros, zeros)
        grams, elements = self.grams(), self.shape.elements
        longer_side = max(self.shape.rows, self.shape.columns)
        side = min(self.shape.rows, self.shape.columns)
        ranks = [max(1, int(rank_share * side)) for rank_share in RANK_SHARES]
        experts = [directions(grams[i, :, i], longer_side) for i in range(len(grams))]
        interference = task_interference_of(grams, experts)
        longest = max(float(grams[i, :, i].trace()) for i in range(len(grams))) ** 0.5
        grams = centred(grams)
        experts = [directions(grams[i, :, i], longer_side, longest * ROUNDING) for i in range(len(grams))]
        return SubspaceSums(
            elements=elements,
            task_interference=interference * elements,
            row_interference=tuple(elements * total for total in row_interference_of(grams, experts, ranks, self.tall)),
            reconstruction_error=reconstruction_error_of(experts, ranks),
        )


def centred(grams: Tensor) -> Tensor:
    """The Gram matrices [K s K s] of the matrices minus their mean."""
    grams = grams - grams.mean(0, keepdim=True)
    return grams - grams.mean(2, keepdim=True)


def task_interference_of(grams: Tensor, experts: Sequence[Directions]) -> float:
    """The entrywise 1-norm of (F'F - I) S (N'N - I): N has all directions of the smaller side, F of the larger one.

    ``grams`` [K s K s] are those of the matrices. With U and V in the places of F and N, or the other way round, the
    norm is the same.
    """
    directions = torch.cat([expert.vectors for expert in experts], 1)
    values = torch.cat([expert.values for expert in experts])
    smaller_gram = directions.T @ directions
    smaller_gram.diagonal().sub_(1)
    total, row = 0.0, 0
    for i, expert in enumerate(experts):  # the rows of one expert at a time bound the memory of the product
        larger_gram = torch.cat([expert.vectors.T @ grams[i, :, j] @ peer.vectors for j, peer in enumerate(experts)], 1)
        larger_gram = larger_gram / expert.values.view(-1, 1) / values
        larger_gram.diagonal(row).sub_(1)
        total += float(((larger_gram * values) @ smaller_gram).abs().sum())
        row += len(expert.values)
    return total


def row_interference_of(grams: Tensor, experts: Sequence[Directions], ranks: Sequence[int], tall: bool) -> list[float]:
    """Sum over pairs of experts of ‖S_i V_i' V_j S_j‖ at each rank, S normalised to length 1 over the k values.

    The right directions V are on the smaller side of a tall matrix; of a wide one ``grams`` [K s K s] give V_i' V_j.
    """
    totals = [0.0] * len(ranks)
    for (i, expert), (j, peer) in permutations(enumerate(experts), 2):
        if not len(expert.values) or not len(peer.values):
            continue
        if tall:
            products = expert.values.view(-1, 1) * (expert.vectors.T @ peer.vectors) * peer.values
        else:
            products = expert.vectors.T @ grams[i, :, j] @ peer.vectors
        squares = products.square().cumsum(0).cumsum(1)
        energies = [directions.values.square().cumsum(0) for directions in (expert, peer)]
        for n, rank in enumerate(ranks):
            a, b = (min(rank, len(energy)) - 1 for energy in energies)
            totals[n] += float(squares[a, b] / (energies[0][a] * energies[1][b])) ** 0.5
    return totals


def reconstruction_error_of(experts: Sequence[Directions], ranks: Sequence[int]) -> Floats:
    """Sum over experts of the squared singular values beyond each rank."""
    return tuple(sum(float(expert.values[rank:].square().sum()) for expert in experts) for rank in ranks)


@statistic(
    form=NUMBER,
    unit="number",
    formula="‖(UᵀU - I) Σ (VᵀV - I)‖₁, U = [U_1 .. U_K], V = [V_1 .. V_K], δ_i = U_i Σ_i V_iᵀ",
    counters=[SubspaceCounter],
    order=90,
    view="task_vectors",
    request="subspaces",
    in_layers=True,
    row="all experts",
)
def task_interference(subspaces: SubspaceSums) -> Array | None:
    """Singular task interference: how far the singular directions of different experts overlap, on both sides at once,
    in the size of the change; 0 where they are orthogonal; mean over matrices by their size.
    """
    return share(array(subspaces.task_interference), subspaces.elements) if subspaces.elements else None


@statistic(
    form=SERIES,
    unit="number",
    formula="I(k) = Σ_{i≠j} ‖(Σ̃_i Ṽ_iᵀ) (Σ̃_j Ṽ_jᵀ)ᵀ‖, of the k strongest directions of δ_i - mean δ, Σ̃ of length 1",
    counters=[SubspaceCounter],
    order=92,
    axis=RANK_AXIS,
    view="task_vectors",
    request="subspaces",
)
def row_interference(subspaces: SubspaceSums) -> Array | None:
    """Row space interference I(k) of the centred task vectors at ranks k of 1, 2, 4, 8, 16, 32, 64 and 100 % of the
    smaller side; from 0, where the row spaces are orthogonal, to K (K - 1); mean over matrices by their size.
    """
    return share(array(subspaces.row_interference), subspaces.elements) if subspaces.elements else None


@statistic(
    form=SERIES,
    unit="squared length",
    formula="R(k) = Σ_i ‖δ_i - mean δ - SVD_k(δ_i - mean δ)‖²",
    counters=[SubspaceCounter],
    order=94,
    axis=RANK_AXIS,
    view="task_vectors",
    request="subspaces",
)
def reconstruction_error(subspaces: SubspaceSums) -> Array | None:
    """Reconstruction error R(k): what the k strongest directions leave of the centred task vectors, at the same ranks;
    sum over matrices.
    """
    return array(subspaces.reconstruction_error) if subspaces.elements else None
