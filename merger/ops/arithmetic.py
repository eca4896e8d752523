"""Tensor arithmetic that methods share: questions about a whole tensor, sums over experts, draws.

A method sees one slice of one tensor at a time. What it must know of the whole it asks with a
``yield``: the flow stops there, the runner puts the question to every slice, and the flow goes on
with the answer; a tensor among the answers is on the CPU, where the parts of all slices meet, and `.to(deltas)`
takes it to where the slice is.

Shapes: k experts, r rows, c columns; a vector is one row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from merger.ops import kernels
from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["tensor", "row", "global"]
Whole = Literal["tensor", "global"]
RatioOf = Literal["total", "remaining"]
T = TypeVar("T")


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


def count(share: Fraction, of: int) -> int:
    """How many of ``of`` elements a ratio selects: floor(share * of), exact (methods.md 0.3)."""
    return math.floor(share * of)


def column(values: Sequence[Fraction], like: Tensor) -> Tensor:
    """One number per expert as a [k 1 1] tensor of ``like``'s dtype and device."""
    return torch.tensor([float(v) for v in values], dtype=like.dtype, device=like.device).view(-1, 1, 1)


def summed(terms: Tensor) -> Tensor:
    """The sum over the experts [k r c] -> [r c], always in their order.

    torch's own sum over five or more associates by the slice's shape, so its last bit would depend
    on how a tensor was cut.
    """
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def weighted_sum(deltas: Tensor, weights: Sequence[Fraction]) -> Tensor:
    """The sum over the experts of delta [k r c] times weight, in their order: [r c]."""
    return kernels.of(deltas).weighted_sum(deltas, column(weights, deltas).flatten())


def anchored_mean(deltas: Tensor, weights: Sequence[Fraction]) -> Tensor:
    """The weighted mean of the deltas [k r c], from the first on, so that equal ones come back bit for bit: [r c]."""
    total = sum(weights)
    return kernels.of(deltas).anchored_sum(deltas, column([w / total for w in weights], deltas).flatten())


def mean_of_agreeing(deltas: Tensor, elected: Tensor, weights: Tensor) -> Tensor:
    """The mean, by ``weights`` [k 1 1], of the deltas [k r c] that have the sign of ``elected`` [r c], or 0: [r c]."""
    return kernels.of(deltas).mean_of_agreeing(deltas, elected, weights.flatten())


def combined(vectors: Tensor, coefficients: Tensor) -> Tensor:
    """The sum of ``vectors`` [k r c] times ``coefficients`` [k] or [k . .], float64. [r c]

    It starts from the first, so that equal vectors come back bit for bit where the coefficients add up to 1.
    """
    several = coefficients if coefficients.dim() == 3 else coefficients.view(-1, 1, 1)
    merged = vectors[0] * summed(several).to(vectors)
    for vector, coefficient in zip(vectors[1:], several[1:].to(vectors), strict=True):
        merged += (vector - vectors[0]) * coefficient
    return merged


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean over the experts at each position by ``weights`` [k r c]; 0 where these add up to 0. [r c]"""
    together = summed(weights)
    return summed(values * (weights / together.masked_fill(together == 0, 1)))  # one alone has a share of exactly 1


def at_least(values: Tensor, limits: Tensor) -> Tensor:
    """Where a value is as large as its limit or larger: bool."""
    return kernels.of(values).at_least(values, limits)


def keep(deltas: Tensor, kept: Tensor) -> Tensor:
    """The deltas where ``kept`` is true, zero elsewhere."""
    return kernels.of(deltas).keep(deltas, kept)


# --- draws: counter-based, so that no mask depends on what was visited before ---------------------


def uniforms(
    key: tuple[object, ...], start: int, *shape: int, double: bool = False, beside: Tensor | None = None
) -> Tensor:
    """Uniforms in [0, 1) of this form from position ``start`` of the stream named by ``key``, on the CPU.

    Where the slice that they go ``beside`` is not computed before someone looks, neither are they.

    Philox4x64-10, keyed by the first 16 bytes of the SHA-256 of the names joined by 0x1f
    (methods.md 0.7): float32 takes 24 bits of each 32-bit half, low half first, float64 takes 53.
    """
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return kernels.for_draws(beside).uniforms(digest[:16], start, shape, double=double)
