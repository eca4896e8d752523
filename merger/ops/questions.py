"""Questions a stage may ask about the whole tensor or the whole model while it sees one slice."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from merger._lazy import torch
from merger.ops.arithmetic import T

if TYPE_CHECKING:
    from torch import Tensor


Scope = Literal["tensor", "row", "global"]


Whole = Literal["tensor", "global"]


@dataclass(frozen=True)
class _Asked:
    """What takes a pass to compute is given as a function: a flow that was started again need not call it."""

    of: Tensor | Callable[[], Tensor]
    scope: Whole = "tensor"

    @cached_property
    def value(self) -> Tensor:
        """This slice's part."""
        return self.of() if callable(self.of) else self.of

    def joined(self, total: Tensor | None) -> Tensor:
        """The value together with that of the slices before."""
        return self.value if total is None else total + self.value

    def answer(self, total: Tensor) -> Any:
        """What the flow is told when all is joined."""
        return total


@dataclass(frozen=True)
class Sum(_Asked):
    """Asks for the sum of a value over all slices of the tensor, or of all merged tensors.

    With ``then`` the answer is what that makes of the sum, worked out once for all slices.
    """

    then: Callable[[Tensor], Any] | None = None

    def answer(self, total: Tensor) -> Any:
        """The sum, or what ``then`` makes of it."""
        return total if self.then is None else self.then(total)


@dataclass(frozen=True)
class Tally:
    """Asks for counts over all slices, which ``add`` adds to int64 ``counters`` of this shape; else as `Sum`."""

    add: Callable[[Tensor], None]
    counters: tuple[int, ...]
    scope: Whole = "tensor"
    then: Callable[[Tensor], Any] | None = None

    def of_all(self, counts: Tensor) -> Sum:
        """The question when all slices have been counted."""
        return Sum(counts, self.scope, self.then)

    def answer(self, counts: Tensor) -> Any:
        """As of `Sum`."""
        return self.of_all(counts).answer(counts)


class Max(_Asked):
    """Asks for the largest value of all slices of the tensor, or of all merged tensors, each element by itself."""

    def joined(self, total: Tensor | None) -> Tensor:
        """The larger."""
        return self.value if total is None else torch.maximum(total, self.value)


class Before(_Asked):
    """Asks for the sum of counts over the slices that come before this one. Costs no pass."""


@dataclass(frozen=True)
class Size:
    """Asks how many elements the tensor, or all merged tensors together, have. Costs no pass."""

    scope: Whole = "tensor"


@dataclass(frozen=True)
class Guess:
    """Asks what was `Found` of a sample of the tensor; None if there was no such sample.

    It may only decide what is asked then, never what comes of it. Costs no pass. Nobody samples the whole model.
    """

    scope: Whole = "tensor"


@dataclass(frozen=True)
class Found:
    """Tells what the last `Guess` would have liked to know, in case that this is a sample. Costs no pass."""

    values: Sequence[Any]


Question = Sum | Tally | Max | Before | Size | Guess | Found


Flow = Generator[Question, Any, T]
"""A computation over one slice that may ask about the whole; its return value is the result."""
