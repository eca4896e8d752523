"""What is counted in one slice: sums that add up over slices, tensors and layers.

Shapes: k experts, r rows, c columns. A position is kept where a vector is not zero.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T", bound="Sums")
Ints = tuple[int, ...]
Floats = tuple[float, ...]


@dataclass(frozen=True)
class Sums:
    """Numbers that add up; plain ones, for small tensors that outlive large ones leave the heap in pieces."""

    elements: int

    def __add__(self: T, other: T) -> T:
        return type(self)(*(_plus(getattr(self, each.name), getattr(other, each.name)) for each in fields(self)))


def _plus(one: Any, other: Any) -> Any:
    return tuple(map(_plus, one, other)) if isinstance(one, tuple) else one + other


@dataclass(frozen=True)
class Vectors(Sums):
    """Several task vectors over the same positions."""

    both: tuple[Ints, ...]  # [k k] positions that both keep; on the diagonal, that one keeps
    opposed: tuple[Ints, ...]  # [k k] positions that both keep with different signs
    holders: Ints  # [k+1] positions kept by exactly 0, 1, .. k of them
    products: tuple[Floats, ...]  # [k k] inner products
    uneven: tuple[Floats, ...]  # [2 k] `unevenness` over rows and columns, times the elements of the matrix
    in_matrices: int  # elements of whole matrices, over which unevenness is averaged


@dataclass(frozen=True)
class Outcome(Sums):
    """One merged task vector, beside the task vectors that it was made of."""

    kept: int
    ends: Ints  # [k+2] positions that end at the base, at each expert, elsewhere
    square: float  # of its norm
    along: Floats  # [k] inner products with the task vectors
    squares: Floats  # [k] the squared norms of those


def vectors(deltas: Tensor) -> Vectors:
    """Counts what task vectors [k r c] keep, share and oppose; of their balance nothing yet."""
    import numpy

    flat = deltas.flatten(1).cpu()
    values = flat.numpy()
    k, elements = values.shape
    kept, negative = values != 0, numpy.signbit(values)
    both, opposed = numpy.zeros((2, k, k), "int64")
    for i in range(k):
        both[i, i] = numpy.count_nonzero(kept[i])
        for j in range(i):
            shared = kept[i] & kept[j]
            both[i, j] = both[j, i] = numpy.count_nonzero(shared)
            shared &= negative[i] ^ negative[j]
            opposed[i, j] = opposed[j, i] = numpy.count_nonzero(shared)
    depth = kept.sum(0, dtype="int16")
    wide = flat.double()
    return Vectors(
        elements=elements,
        both=_plain(both),
        opposed=_plain(opposed),
        holders=tuple(int(numpy.count_nonzero(depth == n)) for n in range(k + 1)),
        products=_plain(wide @ wide.T),
        uneven=((0.0,) * k,) * 2,
        in_matrices=0,
    )


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


# --- balance over rows and columns ----------------------------------------------------------------


def kept_by_line(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """How many positions of [k r c] each row keeps, [k r], and each column, [k c]."""
    import numpy

    kept = deltas.cpu().numpy() != 0
    return tuple(torch.from_numpy(numpy.count_nonzero(kept, axis=axis)) for axis in (2, 1))  # type: ignore[return-value]


def unevenness(squares: Tensor, lines: int, total: Tensor) -> Tensor:
    """Standard deviation over mean of what ``lines`` rows or columns keep: 0 where all keep alike.

    ``squares`` [k] is the sum of their squared counts, ``total`` [k] of the counts. Random masks of density p
    over c columns have sqrt((1 - p) / (p c)) over their rows; a vector that keeps nothing has 0.
    """
    mean_square = total.double().square().clamp(min=1) / lines
    return (squares.double() / mean_square - 1).clamp(min=0).sqrt().where(total > 0, 0)


def kept_by_cell(deltas: Tensor, first: int, rows: int, cells: int) -> Tensor:
    """How many positions are kept in each of ``cells`` x ``cells`` pieces of a matrix, in some of its rows: [k y x].

    ``first`` is the slice's first row and ``rows`` the matrix's; a smaller matrix has a piece for each element.
    """
    k, r, c = deltas.shape
    high, wide = min(cells, rows), min(cells, c)
    down = torch.arange(first, first + r) * high // rows
    across = torch.arange(c) * wide // c
    kept = (deltas != 0).cpu().double()
    by_column = torch.zeros(k, r, wide, dtype=torch.float64).index_add_(2, across, kept)
    return torch.zeros(k, high, wide, dtype=torch.float64).index_add_(1, down, by_column).long()
