"""The counter of a merged vector: its positions, its inner products, and where each of its positions ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, ClassVar

from merger.inspection.counters import Counter, Floats, Ints, MatrixShape, MergedSlice, Subject, Sums
from merger.ops.kernels import counting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MergedSums(Sums):
    """Counts of one merged vector beside the k task vectors that it was made of."""

    elements: int
    positions: int  # where it is not zero
    endings: Ints  # [k+2] positions that end at the base, at each expert, elsewhere
    square: float  # its squared norm
    products: Floats  # [k] inner products with the task vectors


class MergedCounter(Counter):
    """Counts a merged vector; sums of floats are added in the order of the slices."""

    subject: ClassVar[Subject] = "merged"

    def __init__(self, shape: MatrixShape) -> None:
        super().__init__(shape)
        self._sums: dict[int, MergedSums] = {}  # by a slice's first row

    def measure(self, piece: MergedSlice) -> MergedSums:
        """The sums of one slice."""
        positions, products = counting.of(piece.delta, piece.deltas).merged(piece.delta, piece.deltas)
        square, *with_experts = products.tolist()
        endings = count_endings(piece.result, piece.base, piece.experts)
        return MergedSums(piece.delta.numel(), positions, endings, square, tuple(with_experts))

    def add(self, piece: MergedSlice, measurement: MergedSums) -> None:
        """Keeps the sums of one slice."""
        self._sums[piece.row] = measurement

    def sums(self) -> MergedSums:
        """The sums of all slices."""
        return reduce(add, (self._sums[row] for row in sorted(self._sums)))


def count_endings(result: Tensor, base: Tensor | None, experts: Tensor) -> Ints:
    """Positions of a result [r c] that end at the base [r c], at exactly one expert's value [k r c], elsewhere: [k+2].

    All are weights, or all are deltas; then the base is None, for zeros. Where several inputs have the value of the
    result, the first counts.
    """
    inputs = (experts,) if base is None else (base, experts)
    return tuple(counting.of(result, *inputs).endings(result, base, experts).tolist())
