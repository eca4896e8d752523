"""The counter of task vectors: positions, pairs of experts, inner products and balance, in one pass of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merger.inspection.counters import Counter, ExpertSlice, Floats, Ints, MatrixShape, Sums, as_tuples
from merger.inspection.counters.balance import Balance
from merger.ops.kernels import counting
from merger.ops.kernels.counting import Counts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VectorSums(Sums):
    """Counts of k task vectors over the same positions."""

    elements: int
    joint: tuple[Ints, ...]  # [k k] positions of both experts; on the diagonal, of one
    conflicts: tuple[Ints, ...]  # [k k] positions of both experts where their signs differ
    holders: Ints  # [k+1] positions of exactly 0, 1, .. k experts
    products: tuple[Floats, ...]  # [k k] inner products
    unevenness: tuple[Floats, ...]  # [3 k] over rows, columns and blocks, times the elements of the matrix
    matrix_elements: Ints  # [3] elements of the matrices that the unevenness is averaged over
    row_squares: Ints  # [k] squared positions of each row, added up


class VectorCounter(Counter):
    """Counts task vectors: whole numbers as slices come, sums of floats in the order of the slices."""

    def __init__(self, shape: MatrixShape) -> None:
        super().__init__(shape)
        self._zero = Counts.zeros(shape.experts, shape.columns)
        self._free_counts: list[Counts] = []  # one for each thread that has counted, but for those in use
        self._products: dict[int, list[list[float]]] = {}  # by a slice's first row
        self._balance = Balance(shape.rows, shape.columns)

    def measure(self, piece: ExpertSlice) -> tuple[Tensor, Tensor]:
        """Inner products [k k], and the positions of the first and the last block [k 2]; counts all else."""
        try:
            counts = self._free_counts.pop()
        except IndexError:
            counts = self._zero + self._zero
        block = self._balance.block
        offset = piece.row * self.shape.columns % block
        measurement = counting.of(piece.deltas).vectors(piece.deltas, offset, block, counts)
        self._free_counts.append(counts)
        return measurement

    def add(self, piece: ExpertSlice, measurement: tuple[Tensor, Tensor]) -> None:
        """Adds the inner products and the split blocks of one slice."""
        products, block_ends = measurement
        start = piece.row * self.shape.columns
        self._products[piece.row] = products.tolist()
        self._balance.add(start, start + piece.deltas[0].numel(), block_ends)

    def sums(self) -> VectorSums:
        """The sums of all slices; rows are the inputs of a neuron, however the matrix is stored."""
        import numpy

        counts, elements = sum(self._free_counts, self._zero), self.shape.elements
        in_order = numpy.array([self._products[row] for row in sorted(self._products)])
        rows, columns, blocks = self._balance.unevenness(counts)
        lines = (columns, rows, blocks) if self.shape.neurons_in_columns else (rows, columns, blocks)
        no_lines = (0.0,) * self.shape.experts
        return VectorSums(
            elements=elements,
            joint=as_tuples(counts.joint),
            conflicts=as_tuples(counts.opposed),
            holders=as_tuples(counts.holders),
            products=as_tuples(in_order.cumsum(0)[-1]),
            unevenness=tuple(no_lines if line is None else as_tuples(line * elements) for line in lines),
            matrix_elements=tuple(0 if line is None else elements for line in lines),
            row_squares=as_tuples(counts.row_squares),
        )
