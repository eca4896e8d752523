"""Distinct values: how many different changes a task vector has, counted exactly up to a bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.inspection.counters import Counter, ExpertSlice, Ints, MatrixShape, Sums
from merger.inspection.statistic import COUNT_BY_EXPERT, Array, array, statistic
from merger.ops.kernels import counting

if TYPE_CHECKING:
    from torch import Tensor

LIMIT = 1 << 20
"""Different values that are counted exactly, of each expert in one tensor; one more stands for all larger numbers.

Fine-tunes in 16 bits have some thousand in a matrix; in float32 nearly every element has a value of its own, and there
is no more to know than that.
"""


@dataclass(frozen=True)
class ValueSums(Sums):
    """The number of different values of each expert."""

    counts: Ints = field(metadata={"join": max})  # [k] of the tensor that has most


class ValueCounter(Counter):
    """Collects the different values of k task vectors, slice by slice in any order."""

    def __init__(self, shape: MatrixShape) -> None:
        super().__init__(shape)
        capacity = min(shape.elements, 2 * (LIMIT + 1))  # the values so far, and those of one slice more
        self._values = torch.empty(shape.experts, capacity, dtype=torch.int32)
        self._sizes = [0] * shape.experts  # values collected, some of them once for each slice that has them
        self._full = [False] * shape.experts  # whether more than LIMIT are different

    def measure(self, piece: ExpertSlice) -> Sequence[Tensor]:
        """The different values of each task vector in a slice; none once the count has reached the limit."""
        return () if all(self._full) else counting.of(piece.deltas).distinct_values(piece.deltas)

    def add(self, piece: ExpertSlice, measurement: Sequence[Tensor]) -> None:
        """Joins the different values of a slice."""
        for k, values in enumerate(measurement):
            values = values[: LIMIT + 1]
            if self._sizes[k] + len(values) > self._values.shape[1]:
                self._drop_duplicates(k)
            if not self._full[k]:
                self._values[k, self._sizes[k] :][: len(values)] = values
                self._sizes[k] += len(values)

    def _drop_duplicates(self, k: int) -> None:
        collected = self._values[k, : self._sizes[k]].view(torch.float32)
        (values,) = counting.of(collected).distinct_values(collected.unsqueeze(0))
        self._sizes[k] = min(len(values), LIMIT + 1)
        self._values[k, : self._sizes[k]] = values[: LIMIT + 1]
        self._full[k] = len(values) > LIMIT

    def sums(self) -> ValueSums:
        """The number of values of each expert; LIMIT + 1 where there are more than LIMIT."""
        for k in range(len(self._sizes)):
            self._drop_duplicates(k)
        return ValueSums(tuple(self._sizes))


@statistic(
    form=COUNT_BY_EXPERT,
    unit="count",
    formula="|{values of δ} - {0}|",
    counters=[ValueCounter],
    order=66,
    label="distinct values",
    in_layers=True,
)
def distinct(values: ValueSums) -> Array:
    """Different values other than zero in the tensor that has most; 1048577 stands for more than 1048576."""
    return array(values.counts)
