"""What is counted in one slice: sums that add up over slices, tensors and layers.

Shapes: k experts, r rows, c columns. A position is kept where a vector is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import add, and_
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T", bound="Sums")
Ints = tuple[int, ...]
Floats = tuple[float, ...]


@dataclass(frozen=True)
class Sums:
    """Numbers that are added up, or joined as their field says; plain ones, for small tensors that outlive
    large ones leave the heap in pieces.
    """

    elements: int

    def __add__(self: T, other: T) -> T:
        def joined(name: str, join: Callable[[Any, Any], Any]) -> Any:
            return _joined(getattr(self, name), getattr(other, name), join)

        return type(self)(*(joined(each.name, each.metadata.get("join", add)) for each in fields(self)))


def _joined(one: Any, other: Any, join: Callable[[Any, Any], Any]) -> Any:
    if isinstance(one, tuple):
        return tuple(_joined(a, b, join) for a, b in zip(one, other, strict=True))
    return join(one, other)


@dataclass(frozen=True)
class Vectors(Sums):
    """Several task vectors over the same positions; all but the counts is known of whole tensors only."""

    both: tuple[Ints, ...]  # [k k] positions that both keep; on the diagonal, that one keeps
    opposed: tuple[Ints, ...]  # [k k] positions that both keep with different signs
    holders: Ints  # [k+1] positions kept by exactly 0, 1, .. k of them
    products: tuple[Floats, ...]  # [k k] inner products
    uneven: tuple[Floats, ...]  # [3 k] `unevenness` over rows, columns and blocks, times the elements of the matrix
    in_matrices: Ints  # [3] elements of whole matrices, over which each is averaged
    distinct: Ints = field(metadata={"join": max})  # [k] different values of the tensor that has most
    ranks: Floats  # [k] effective ranks, times the elements of the matrix
    ranked: int  # elements of matrices of which ranks were asked for, over which they are averaged


@dataclass(frozen=True)
class Outcome(Sums):
    """One merged task vector, beside the task vectors that it was made of."""

    kept: int
    ends: Ints  # [k+2] positions that end at the base, at each expert, elsewhere
    square: float  # of its norm
    along: Floats  # [k] inner products with the task vectors
    squares: Floats  # [k] the squared norms of those


def vectors(deltas: Tensor) -> Vectors:
    """Counts what task vectors [k r c] keep, share and oppose; of their balance and values nothing yet."""
    import numpy

    values = deltas.cpu().numpy()
    k = len(values)
    kept, negative = _words(values != 0), _words(values < 0)
    both, opposed = numpy.zeros((2, k, k), "int64")
    for i in range(k):
        both[i, i] = _ones(kept[i])
        for j in range(i):
            shared = kept[i] & kept[j]
            both[i, j] = both[j, i] = _ones(shared)
            opposed[i, j] = opposed[j, i] = _ones(shared & (negative[i] ^ negative[j]))
    wide = deltas.flatten(1).cpu().double()
    return Vectors(
        elements=values[0].size,
        both=_plain(both),
        opposed=_plain(opposed),
        holders=_holders(kept, values[0].size),
        products=_plain(wide @ wide.T),
        uneven=((0.0,) * k,) * 3,
        in_matrices=(0,) * 3,
        distinct=(0,) * k,
        ranks=(0.0,) * k,
        ranked=0,
    )


def _words(mask: Any) -> Any:
    """Booleans as bits of whole 64-bit words, zeros behind the last: [k w]. 64 positions are counted at once."""
    import numpy

    flat = numpy.packbits(mask.reshape(len(mask), -1), axis=1)
    words = numpy.zeros((len(flat), -(-flat.shape[1] // 8) * 8), "uint8")
    words[:, : flat.shape[1]] = flat
    return words.view("uint64")


def _ones(words: Any) -> int:
    """How many bits are 1."""
    import numpy

    return int(numpy.bitwise_count(words).sum(dtype="int64"))


def _holders(kept: Any, elements: int) -> Ints:
    """How many of ``elements`` positions exactly 0, 1, .. k of the vectors of bits [k w] keep.

    An adder of bits: ``digits[d]`` has the d-th binary digit of every position's count.
    """
    digits: list[Any] = []
    for i, bits in enumerate(kept, 1):
        carry = bits
        for d, digit in enumerate(digits):
            digits[d], carry = digit ^ carry, digit & carry
        if i.bit_length() > len(digits):
            digits.append(carry)
    counts = [_ones(_with_digits(digits, n)) for n in range(1, len(kept) + 1)]
    return (elements - sum(counts), *counts)


def _with_digits(digits: Sequence[Any], number: int) -> Any:
    """Where binary digits, given as bits, make a number."""
    return reduce(and_, (digit if number >> d & 1 else ~digit for d, digit in enumerate(digits)))


def outcome(merged: Tensor, deltas: Tensor, ends: Ints) -> Outcome:
    """Counts what a merged task vector [r c] has of those that it was made of [k r c], given its `endings`."""
    import numpy

    flat, wide = merged.flatten().double().cpu(), deltas.flatten(1).double().cpu()
    return Outcome(
        elements=flat.numel(),
        kept=int(numpy.count_nonzero(flat.numpy())),
        ends=ends,
        square=float(flat @ flat),
        along=tuple(float(each @ flat) for each in wide),
        squares=tuple(float(each @ each) for each in wide),
    )


def endings(result: Tensor, base: Tensor, experts: Tensor) -> Ints:
    """How many positions end at the base [r c], at each of the experts [k r c] exactly, and elsewhere: [k+2].

    Weights or deltas; where several experts have the value of the result, the first of them counts.
    """
    import numpy

    found, *inputs = (each.flatten().cpu().numpy() for each in (result.float(), base.float(), *experts.float()))
    left = numpy.ones_like(found, dtype=bool)
    counts = []
    for each in inputs:
        here = left & (found == each)
        counts.append(int(numpy.count_nonzero(here)))
        left &= ~here
    return (*counts, int(numpy.count_nonzero(left)))


def _plain(values: Any) -> Any:
    """An array or a tensor as numbers in tuples."""
    return tuple(tuple(each) if isinstance(each, list) else each for each in values.tolist())
