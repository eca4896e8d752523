"""The loops that count what task vectors keep and share, twice with the same results: compiled, and in torch.

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
    """The loops in torch, where the tensors are; only counts come back."""

    def vectors(self, deltas: Tensor, first: int, size: int, into: Counts) -> tuple[Tensor, Tensor]:
        """Counts task vectors [k r c] into ``into``; inner products [k k] and what is kept of blocks cut off [k 2].

        Blocks are ``size`` elements; element 0 is number ``first`` of the first block, so the first and the last may
        lie in other slices too.
        """
        kept = deltas != 0
        k, _, columns = kept.shape
        flat, positive = kept.flatten(1), (deltas > 0).flatten(1).double()  # whole numbers, which no sum rounds
        negative = flat.double() - positive
        against = positive @ negative.T
        into.both += _whole(flat.double() @ flat.double().T)
        into.opposed += _whole(against + against.T)
        into.holders += torch.bincount(flat.sum(0), minlength=k + 1).cpu()
        into.row_squares += kept.sum(2).square().sum(1).cpu()
        into.by_column += kept.sum(1, dtype=torch.int32).view(k, columns).cpu()
        head, tail = min(-first % size, flat.shape[1]), (first + flat.shape[1]) % size
        if first and first + flat.shape[1] < size:
            head, tail = 0, flat.shape[1]  # all of it lies in one block that ends elsewhere
        blocks = flat[:, head : flat.shape[1] - tail].reshape(k, -1, size).sum(2)
        into.block_squares += blocks.square().sum(1).cpu()
        cut = torch.stack([flat[:, :head].sum(1), flat[:, flat.shape[1] - tail :].sum(1)], 1)
        return _products(deltas, deltas), cut.cpu()

    def merged(self, merged: Tensor, deltas: Tensor) -> tuple[int, Tensor]:
        """Positions that a merged vector [r c] keeps; its inner products with itself and with deltas [k r c]: [1+k]."""
        alone = merged.unsqueeze(0)
        return int(merged.count_nonzero()), torch.cat([_products(alone, alone), _products(alone, deltas)], 1)[0]

    def different(self, deltas: Tensor) -> list[Tensor]:
        """Each vector's [k r c] different float32 bit patterns other than those of zeros, in any order: int32."""
        patterns = deltas.flatten(1).contiguous().view(torch.int32)
        return [torch.unique(own[own & 0x7FFFFFFF != 0]).cpu() for own in patterns]

    def endings(self, result: Tensor, base: Tensor | None, experts: Tensor) -> Tensor:
        """Positions of [n] that have the value of base [n], or 0, of each expert [k n], of none: [k+2].

        Where several have it, the first of them counts.
        """
        ends, *inputs = (values.flatten().float() for values in (result, *experts))
        left = ends != (0 if base is None else base.flatten().float())
        counts = [left.numel() - left.sum()]
        for values in inputs:
            equal = left & (ends == values)
            counts.append(equal.sum())
            left = left ^ equal
        return torch.stack([*counts, left.sum()]).cpu()


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


def _whole(counts: Tensor) -> Tensor:
    """Counts that are in float64 as whole numbers in host memory."""
    return counts.long().cpu()


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of float32 vectors [k n] and [m n] in float64, in host memory: [k m].

    On the CPU each lane is summed up from the first number to the last, and so are the lanes, as the compiled loops do;
    a GPU adds in another order, so its last bits may be others.
    """
    sides = []
    for side in (left, right):
        values = side.flatten(1).double()
        rows = -(-values.shape[1] // LANES)
        padded = torch.nn.functional.pad(values, (0, rows * LANES - values.shape[1]))
        sides.append(padded.view(len(values), rows, LANES))
    if not len(sides[1]):
        return torch.zeros(len(sides[0]), 0, dtype=torch.float64)
    rows_of_sums = [torch.stack([_last_sum(_last_sum(one * other)) for other in sides[1]]) for one in sides[0]]
    return torch.stack(rows_of_sums).cpu()


def _last_sum(values: Tensor) -> Tensor:
    """The sum over the first axis, one after the other; 0 of nothing."""
    return values.cumsum(0)[-1] if len(values) else values.sum(0)


_NATIVE, _TORCH = NativeCounting(), Counting()


def of(*values: Tensor) -> Counting:
    """The loops for these tensors, compiled where all of them are of one dtype in memory that C can read."""
    first = values[0]
    plain = all(each.device.type == "cpu" and each.dtype == first.dtype for each in values)
    return _NATIVE if plain and stored_as(first.dtype) is not None else _TORCH
