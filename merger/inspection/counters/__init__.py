"""Counters: what statistics are computed from, counted slice by slice and added up over tensors.

A position belongs to an expert where the expert's task vector, as it enters the view, is not zero.

Shapes: k experts, r rows, c columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S", bound="Sums")
Ints = tuple[int, ...]
Floats = tuple[float, ...]
Subject = Literal["experts", "merged"]
"""What a view shows: the experts' task vectors, or the merged vector beside them."""


@dataclass(frozen=True)
class MatrixShape:
    """The matrix that a counter sees."""

    experts: int
    rows: int
    columns: int
    neurons_in_columns: bool = False  # a stored [in, out] matrix, whose rows are what other matrices have as columns

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.rows * self.columns

    @property
    def is_vector(self) -> bool:
        """Whether one side has a single element, so that rows, columns and singular values say nothing."""
        return min(self.rows, self.columns) <= 1


@dataclass(frozen=True)
class ExpertSlice:
    """Some rows of the experts' task vectors."""

    row: int  # the first row's index in the matrix
    base: Tensor  # [r c]
    deltas: Tensor  # [k r c]


@dataclass(frozen=True)
class MergedSlice:
    """Some rows of a merged vector beside the task vectors that it was made of."""

    row: int
    delta: Tensor  # [r c]
    deltas: Tensor  # [k r c]
    result: Tensor  # [r c] what is compared with the inputs, bit for bit
    base: Tensor | None  # [r c] in the dtype of `result`; None stands for zeros
    experts: Tensor  # [k r c] likewise


@dataclass(frozen=True)
class Sums:
    """Numbers of one matrix that are added up over matrices, or joined as a field's metadata says.

    They are Python numbers in tuples: small tensors that outlive large ones would leave the heap in pieces.
    """

    def __add__(self: S, term: S) -> S:
        def join_field(name: str, join: Callable[[Any, Any], Any]) -> Any:
            return _joined(getattr(self, name), getattr(term, name), join)

        return type(self)(*(join_field(field.name, field.metadata.get("join", add)) for field in fields(self)))


SumsByCounter = Mapping[type["Counter"], Sums]


class Counter(ABC):
    """Counts the slices of one matrix in one view; they come in any order, from several threads."""

    subject: ClassVar[Subject] = "experts"

    def __init__(self, shape: MatrixShape) -> None:
        self.shape = shape

    @abstractmethod
    def measure(self, piece: Any) -> Any:
        """Returns what the counter needs of one slice; several threads measure at the same time."""

    @abstractmethod
    def add(self, piece: Any, measurement: Any) -> None:
        """Adds the measurement of one slice; one thread at a time."""

    @abstractmethod
    def sums(self) -> Sums:
        """Returns the sums of all slices."""


def _joined(total: Any, term: Any, join: Callable[[Any, Any], Any]) -> Any:
    if not isinstance(total, tuple):
        return join(total, term)
    if total and isinstance(total[0], tuple):
        return tuple(_joined(*pair, join) for pair in zip(total, term, strict=True))
    return tuple(map(join, total, term))


def as_tuples(values: Any) -> Any:
    """An array or a tensor as numbers in nested tuples."""
    return _tuples(values.tolist())


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list) else values
