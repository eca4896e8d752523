"""What is counted in one slice: sums that add up over slices, tensors and layers.

Shapes: k experts, r rows, c columns. A position is kept where a vector is not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import add
from typing import TYPE_CHECKING, Any, TypeVar

from merger.ops.kernels import counting

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
    """Several task vectors over the same positions."""

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


def outcome(merged: Tensor, deltas: Tensor, ends: Ints) -> Outcome:
    """Counts what a merged task vector [r c] has of those that it was made of [k r c], given its `endings`."""
    kept, products = counting.of(merged, deltas).merged(merged, deltas)
    square, *along = products.tolist()
    return Outcome(merged.numel(), kept, ends, square, tuple(along), squares=(0.0,) * len(deltas))


def endings(result: Tensor, base: Tensor | None, experts: Tensor) -> Ints:
    """How many positions end at the base [r c], at each of the experts [k r c] exactly, and elsewhere: [k+2].

    Weights, or deltas, whose base is 0; where several have the value of the result, the first of them counts.
    """
    inputs = (experts,) if base is None else (base, experts)
    return tuple(counting.of(result, *inputs).endings(result, base, experts).tolist())
