"""What is counted in one slice: sums that add up over slices, tensors and layers.

Shapes: k experts, r rows, c columns. A position is kept where a vector is not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import add
from typing import TYPE_CHECKING, Any, TypeVar

from merger.kernels import counting

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
    if not isinstance(one, tuple):
        return join(one, other)
    if one and isinstance(one[0], tuple):
        return tuple(_joined(a, b, join) for a, b in zip(one, other, strict=True))
    return tuple(map(join, one, other))


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
    squares: Floats  # [k] the squared norms of those, known of whole tensors only


def vectors(deltas: Tensor) -> Vectors:
    """Counts what task vectors [k r c] keep, share and oppose; of their balance and values nothing yet."""
    loops = counting.of(deltas)
    both, opposed, holders = loops.pairs(deltas)
    k = len(deltas)
    return Vectors(
        elements=deltas[0].numel(),
        both=_plain(both),
        opposed=_plain(opposed),
        holders=_plain(holders),
        products=_plain(loops.products(deltas, deltas)),
        uneven=((0.0,) * k,) * 3,
        in_matrices=(0,) * 3,
        distinct=(0,) * k,
        ranks=(0.0,) * k,
        ranked=0,
    )


def outcome(merged: Tensor, deltas: Tensor, ends: Ints) -> Outcome:
    """Counts what a merged task vector [r c] has of those that it was made of [k r c], given its `endings`."""
    alone = merged.unsqueeze(0)
    loops = counting.of(alone, deltas)
    both, _, _ = loops.pairs(alone)
    return Outcome(
        elements=merged.numel(),
        kept=int(both),
        ends=ends,
        square=float(loops.products(alone, alone)),
        along=_plain(loops.products(alone, deltas)[0]),
        squares=(0.0,) * len(deltas),
    )


def endings(result: Tensor, base: Tensor | None, experts: Tensor) -> Ints:
    """How many positions end at the base [r c], at each of the experts [k r c] exactly, and elsewhere: [k+2].

    Weights, or deltas, whose base is 0; where several have the value of the result, the first of them counts.
    """
    inputs = (experts,) if base is None else (base, experts)
    counts: Ints = _plain(counting.of(result, *inputs).endings(result, base, experts))
    return counts


def _plain(values: Any) -> Any:
    """An array or a tensor as numbers in tuples."""
    return tuple(tuple(each) if isinstance(each, list) else each for each in values.tolist())
