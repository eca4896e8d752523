"""The loops that count what task vectors keep and share, twice with the same results: compiled, and in numpy.

A position is kept where a vector is not zero. Shapes: k experts, r rows, c columns, n elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.kernels.library import STORED, call, stored_as

if TYPE_CHECKING:
    from torch import Tensor

LANES = 16
"""Sums that run side by side in an inner product; whoever adds in another order gets other bits."""

MOST = 254
"""Vectors of which a byte says how many keep a position."""


@dataclass
class Counts:
    """Counts of k task vectors of c columns, added up over slices in any order; of each thread, or of all."""

    both: Tensor  # [k k] positions that both keep
    opposed: Tensor  # [k k] positions that both keep with different signs
    holders: Tensor  # [k+1] positions that exactly 0, 1, .. k keep
    row_squares: Tensor  # [k] of what each row keeps
    block_squares: Tensor  # [k] of what each block keeps that lies in one slice
    by_column: Tensor  # [k c] int32, all others int64

    @classmethod
    def none(cls, k: int, c: int) -> Counts:
        """Nothing counted yet."""
        both, opposed = torch.zeros(2, k, k, dtype=torch.int64)
        row_squares, block_squares = torch.zeros(2, k, dtype=torch.int64)
        holders, by_column = torch.zeros(k + 1, dtype=torch.int64), torch.zeros(k, c, dtype=torch.int32)
        return cls(both, opposed, holders, row_squares, block_squares, by_column)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(one + more for one, more in zip(vars(self).values(), vars(other).values(), strict=True)))


class Counting:
    """The loops in numpy, for tensors of any device."""

    def vectors(self, deltas: Tensor, first: int, size: int, into: Counts) -> tuple[Tensor, Tensor]:
        """Counts task vectors [k r c] into ``into``; inner products [k k] and what is kept of blocks cut off [k 2].

        Blocks are ``size`` elements; element 0 is number ``first`` of the first block, so the first and the last may
        lie in other slices too.
        """
        import numpy

        values = deltas.cpu().numpy()
        kept, negative = values != 0, values < 0
        k = len(values)
        for i in range(k):
            for j in range(k):
                shared = kept[i] & kept[j]
                into.both[i, j] += int(numpy.count_nonzero(shared))
                into.opposed[i, j] += int(numpy.count_nonzero(shared & (negative[i] ^ negative[j])))
        into.holders += torch.from_numpy(numpy.bincount(kept.sum(0).ravel(), minlength=k + 1))
        into.row_squares += torch.from_numpy((kept.sum(2) ** 2).sum(1))
        into.by_column += torch.from_numpy(kept.sum(1).astype("int32"))
        flat = kept.reshape(k, -1)
        head, tail = min(-first % size, flat.shape[1]), (first + flat.shape[1]) % size
        if first and first + flat.shape[1] < size:
            head, tail = 0, flat.shape[1]  # all of it lies in one block that ends elsewhere
        whole = flat[:, head : flat.shape[1] - tail].reshape(k, -1, size).sum(2)
        into.block_squares += torch.from_numpy((whole**2).sum(1))
        cut = [[numpy.count_nonzero(own[:head]), numpy.count_nonzero(own[len(own) - tail :])] for own in flat]
        return _products(deltas, deltas), torch.tensor(cut)

    def merged(self, merged: Tensor, deltas: Tensor) -> tuple[int, Tensor]:
        """Positions that a merged vector [r c] keeps; its inner products with itself and with deltas [k r c]: [1+k]."""
        alone = merged.unsqueeze(0)
        return int(merged.count_nonzero()), torch.cat([_products(alone, alone), _products(alone, deltas)], 1)[0]

    def different(self, deltas: Tensor) -> list[Tensor]:
        """Each vector's [k r c] different float32 bit patterns other than those of zeros, in any order: int32."""
        import numpy

        several = deltas.flatten(1).cpu().contiguous().view(torch.int32).numpy()
        return [torch.from_numpy(numpy.unique(patterns[patterns & 0x7FFFFFFF != 0])) for patterns in several]

    def endings(self, result: Tensor, base: Tensor | None, experts: Tensor) -> Tensor:
        """Positions of [n] that have the value of base [n], or 0, of each expert [k n], of none: [k+2].

        Where several have it, the first of them counts.
        """
        import numpy

        found, *inputs = (each.flatten().cpu().numpy() for each in (result.float(), *experts.float()))
        left = found != (0 if base is None else base.float().flatten().cpu().numpy())
        counts = [left.size - numpy.count_nonzero(left)]
        for each in inputs:
            equal = left & (found == each)
            counts.append(numpy.count_nonzero(equal))
            left ^= equal
        return torch.tensor([*counts, numpy.count_nonzero(left)])


class NativeCounting(Counting):
    """The loops in counting.c, for tensors in the memory of the CPU."""

    def vectors(self, deltas: Tensor, first: int, size: int, into: Counts) -> tuple[Tensor, Tensor]:
        """As `Counting.vectors`."""
        deltas = deltas.contiguous()
        k, r, c = deltas.shape
        if k > MOST:
            return super().vectors(deltas, first, size, into)
        cut, products = torch.zeros(k, 2, dtype=torch.int64), torch.empty(k, k, dtype=torch.float64)
        if not call("count_vectors", deltas, k, r, c, first, size, *vars(into).values(), cut, products):
            raise MemoryError
        return products, cut

    def merged(self, merged: Tensor, deltas: Tensor) -> tuple[int, Tensor]:
        """As `Counting.merged`."""
        products = torch.empty(1 + len(deltas), dtype=torch.float64)
        arrays = merged.contiguous(), deltas.contiguous()
        kept = call("count_merged", *arrays, len(deltas), merged.numel(), products)
        if kept < 0:
            raise MemoryError
        return kept, products

    def different(self, deltas: Tensor) -> list[Tensor]:
        """As `Counting.different`; in a table that is made larger whenever it may be taken by more than half."""
        deltas = deltas.contiguous()
        k, n = len(deltas), deltas[0].numel()
        found, known = torch.empty(k, n, dtype=torch.int32), torch.empty(k, dtype=torch.int64)
        high, bits = torch.empty(1 << 16, dtype=torch.uint8), 14
        while not call("different", deltas, k, n, high, _table(bits), bits, found, known):
            bits += 2
        return [own[:count] for own, count in zip(found, known.tolist(), strict=True)]

    def endings(self, result: Tensor, base: Tensor | None, experts: Tensor) -> Tensor:
        """As `Counting.endings`."""
        ends = torch.zeros(len(experts) + 2, dtype=torch.int64)
        arrays = (None if each is None else each.contiguous() for each in (result, base, experts))
        call(f"endings_{STORED[str(result.dtype)]}", *arrays, len(experts), result.numel(), ends)
        return ends


def _table(bits: int) -> Tensor:
    return torch.empty(1 << bits, dtype=torch.int32)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of float32 vectors [k n] and [m n] in float64: [k m]."""
    import numpy

    sides = []
    for side in (left, right):
        values = side.flatten(1).cpu().double().numpy()
        rows = -(-values.shape[1] // LANES)
        padding = [(0, 0), (0, rows * LANES - values.shape[1])]
        sides.append(numpy.pad(values, padding).reshape(len(values), rows, LANES))
    sums = [[(one * other).sum(0) for other in sides[1]] for one in sides[0]]  # row after row, as numpy adds these
    return torch.tensor([[lanes.cumsum()[-1] for lanes in row] for row in sums], dtype=torch.float64)


_NATIVE, _NUMPY = NativeCounting(), Counting()


def of(*values: Tensor) -> Counting:
    """The loops for these tensors, compiled where all of them are of one dtype in memory that C can read."""
    first = values[0]
    plain = all(each.device.type == "cpu" and each.dtype == first.dtype for each in values)
    return _NATIVE if plain and stored_as(first.dtype) is not None else _NUMPY
