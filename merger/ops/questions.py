"""Questions that a stage asks about the whole tensor, or the whole model, while it sees one slice.

A flow yields a question and is resumed with the answer. `Size` and `PrefixSum` are answered at once. A `Total` is
answered when every slice has contributed its part, so it costs a pass over the slices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
P = TypeVar("P")
Scope = Literal["tensor", "row", "global"]
"""What a selection ranks together: a tensor, a row, or all tensors of the same pipeline."""
Whole = Literal["tensor", "global"]
"""What a question is about: all slices of the tensor, or of all tensors of the same pipeline."""
Key = tuple[Whole, str, int]
"""Identifies a question of a flow: its scope, its name, and its number among the flow's questions of both."""

UNANSWERED = object()
"""The reply to a question that needs a pass over all slices first."""


class Answers(Protocol):
    """The source of answers for the flows of one tensor."""

    def size(self, scope: Whole) -> int:
        """Returns the number of elements of the tensor, or of all tensors that are ranked together."""

    def total(self, key: Key, question: Total[Any]) -> object:
        """Returns the answer to a question that all slices contributed to, or `UNANSWERED`."""

    def prefix_sum(self, key: Key, i: int, question: PrefixSum) -> Tensor:
        """Returns the sum over the slices before slice ``i``, and adds that of slice ``i`` for the next."""

    def sample_note(self, number: int) -> Sequence[object] | None:
        """Returns the ``number``-th note that a flow over a sample of the tensor made; None without a sample."""

    def note(self, number: int, values: Sequence[object]) -> None:
        """Keeps the flow's ``number``-th note."""


class Question(ABC):
    """A question of a flow. It knows how it is answered."""

    scope: Whole

    @property
    def name(self) -> str:
        """The name under which it is counted among the questions of a flow."""
        return type(self).__name__

    @abstractmethod
    def reply(self, answers: Answers, key: Key, i: int) -> object:
        """Returns the answer for slice ``i``, or `UNANSWERED`."""


Flow = Generator[Question, Any, T]
"""A computation over one slice that may ask questions; its return value is the result.

The type of an answer depends on the question, which no type of a generator can say: hence `Any`.
"""


@dataclass(frozen=True)
class Size(Question):
    """Asks for the number of elements of the tensor, or of all tensors that are ranked together."""

    scope: Whole = "tensor"

    def reply(self, answers: Answers, key: Key, i: int) -> int:
        """Returns the number of elements."""
        return answers.size(self.scope)


@dataclass(frozen=True)
class PrefixSum(Question):
    """Asks for the sum of counts over the slices before this one."""

    counts: Callable[[], Tensor]
    scope: Whole = "tensor"

    def reply(self, answers: Answers, key: Key, i: int) -> Tensor:
        """Returns the sum, int64, in the shape of the counts."""
        return answers.prefix_sum(key, i, self)


class Total(Question, Generic[P]):
    """A question that every slice contributes a part to."""

    def reply(self, answers: Answers, key: Key, i: int) -> object:
        """Returns the answer, or `UNANSWERED` before the pass that collects the parts."""
        return answers.total(key, self)

    @abstractmethod
    def part(self, counters: list[Tensor]) -> P | None:
        """Returns this slice's part; None if it was added to one of the ``counters`` instead."""

    @abstractmethod
    def join(self, total: P, part: P) -> P:
        """Returns the total of the slices before together with the next part."""

    def answer(self, total: P) -> object:
        """Returns the answer for all slices, given the total of their parts."""
        return total


@dataclass(frozen=True)
class Sum(Total["Tensor"]):
    """Asks for the sum of a value over all slices, in their order.

    A value that takes a pass over the slice to compute is given as a function. With ``finish`` the answer is the result
    of that function on the sum; it is computed once for all slices of a tensor.
    """

    of: Tensor | Callable[[], Tensor]
    scope: Whole = "tensor"
    finish: Callable[[Tensor], object] | None = None

    @cached_property
    def value(self) -> Tensor:
        """This slice's value."""
        return self.of() if callable(self.of) else self.of

    def part(self, counters: list[Tensor]) -> Tensor:
        """Returns the value."""
        return self.value.cpu()

    def join(self, total: Tensor, part: Tensor) -> Tensor:
        """Returns the sum."""
        return total + part

    def answer(self, total: Tensor) -> object:
        """Returns the sum, or the result of ``finish``."""
        return total if self.finish is None else self.finish(total)


@dataclass(frozen=True)
class MatrixSums(Total[tuple["Tensor", ...]]):
    """Asks for the sums over all slices of several values, such as Gram matrices, that are too large to send about.

    They stay on the device of the first slice.
    """

    of: Callable[[], tuple[Tensor, ...]]
    scope: Whole = "tensor"

    def part(self, counters: list[Tensor]) -> tuple[Tensor, ...]:
        """Returns the values."""
        return self.of()

    def join(self, total: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Returns the sums, in place of the first ones."""
        return tuple(value.add_(addition.to(value.device)) for value, addition in zip(total, part, strict=True))


@dataclass(frozen=True)
class Max(Total["Tensor"]):
    """Asks for the largest value over all slices, element by element."""

    value: Tensor
    scope: Whole = "tensor"

    def part(self, counters: list[Tensor]) -> Tensor:
        """Returns the value."""
        return self.value.cpu()

    def join(self, total: Tensor, part: Tensor) -> Tensor:
        """Returns the larger of both."""
        return torch.maximum(total, part)
