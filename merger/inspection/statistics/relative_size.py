"""Relative size: how large an expert's change is beside the base, which tells a fine-tune from an unrelated model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from merger.inspection.counters import Counter, ExpertSlice, MatrixShape, Sums
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_EXPERT, floats, share, statistic
from merger.ops.kernels import counting

if TYPE_CHECKING:
    from torch import Tensor

LARGE = 0.5
"""A relative size that fine-tunes stay far below and unrelated models, which have about sqrt(2), do not reach."""


@dataclass(frozen=True)
class BaseSums(Sums):
    """The squared norm of the base."""

    square: float


class BaseCounter(Counter):
    """Adds up the squares of the base, in the order of the slices."""

    def __init__(self, shape: MatrixShape) -> None:
        super().__init__(shape)
        self._squares: dict[int, float] = {}  # by a slice's first row

    def measure(self, piece: ExpertSlice) -> float:
        """The squared norm of some rows of the base."""
        no_experts = piece.base.unsqueeze(0)[:0]
        _, products = counting.of(piece.base).merged(piece.base, no_experts)
        return float(products[0])

    def add(self, piece: ExpertSlice, measurement: float) -> None:
        """Keeps the squared norm of a slice."""
        self._squares[piece.row] = measurement

    def sums(self) -> BaseSums:
        """The squared norm of the base."""
        return BaseSums(reduce(add, (self._squares[row] for row in sorted(self._squares))))


def _reading(sizes: Mapping[str, float]) -> Iterable[str]:
    for name, size in sizes.items():
        if size >= LARGE:
            yield (
                f"{name} differs from the base by {size * 100:.0f} % of the base's length, which no fine-tune does: "
                f"check that {name} was trained from this base"
            )
    usual = [f"{name} by {size * 100:.2g} %" for name, size in sizes.items() if size < LARGE]
    if usual:
        yield f"as fine-tunes do, these change the base by a small part of its length: {', '.join(usual)}"


@statistic(
    form=BY_EXPERT,
    unit="ratio",
    formula="‖δ‖ / ‖base‖",
    counters=[VectorCounter, BaseCounter],
    order=35,
    label="relative size",
    view="task_vectors",
    in_layers=True,
    reading=_reading,
)
def relative_size(vectors: VectorSums, base: BaseSums) -> Tensor:
    """Length of an expert's task vector relative to the base's; 0.5 and more suggests another base."""
    return share(floats(vectors.products).diagonal().sqrt(), base.square**0.5)
