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
    """Counts of k task vectors of c columns; sums over slices in any order, by thread or for all threads."""

    joint: Tensor  # [k k] positions where both vectors are nonzero
    opposed: Tensor  # [k k] positions where both vectors are nonzero with different signs
    holders: Tensor  # [k+1] positions where exactly 0, 1, .. k vectors are nonzero
    row_squares: Tensor  # [k] sums of squared nonzero counts by row
    block_squares: Tensor  # [k] sums of squared nonzero counts by block, for blocks within one slice
    by_column: Tensor  # [k c] int32, all others int64

    @classmethod
    def zeros(cls, k: int, c: int) -> Counts:
        """Returns counts of zero."""
        joint, opposed = torch.zeros(2, k, k, dtype=torch.int64)
        row_squares, block_squares = torch.zeros(2, k, dtype=torch.int64)
        holders, by_column = torch.zeros(k + 1, dtype=torch.int64), torch.zeros(k, c, dtype=torch.int32)
        return cls(joint, opposed, holders, row_squares, block_squares, by_column)

    def __add__(self, counts: Counts) -> Counts:
        return Counts(
            *(total + increment for total, increment in zip(vars(self).values(), vars(counts).values(), strict=True))
        )


class Counting:
    """The loops in torch, where the tensors are; only counts come back."""

    def vectors(self, deltas: Tensor, first: int, size: int, into: Counts) -> tuple[Tensor, Tensor]:
        """Adds the counts of task vectors [k r c] to ``into``.

        Returns inner products [k k], and nonzero counts of the first and last block where the slice cuts them [k 2].
        Blocks are ``size`` elements; element 0 has the number ``first`` in the tensor.
        """
        mask = deltas != 0
        k, _, columns = mask.shape
        flat, positive = mask.flatten(1), (deltas > 0).flatten(1).double()  # whole numbers, which no sum rounds
        negative = flat.double() - positive
        against = positive @ negative.T
        into.joint += _as_int64(flat.double() @ flat.double().T)
        into.opposed += _as_int64(against + against.T)
        into.holders += torch.bincount(flat.sum(0), minlength=k + 1).cpu()
        into.row_squares += mask.sum(2).square().sum(1).cpu()
        into.by_column += mask.sum(1, dtype=torch.int32).view(k, columns).cpu()
        head, tail = min(-first % size, flat.shape[1]), (first + flat.shape[1]) % size
        if first and first + flat.shape[1] < size:
            head, tail = 0, flat.shape[1]  # all of it lies in one block that ends elsewhere
        blocks = flat[:, head : flat.shape[1] - tail].reshape(k, -1, size).sum(2)
        into.block_squares += blocks.square().sum(1).cpu()
        cut = torch.stack([flat[:, :head].sum(1), flat[:, flat.shape[1] - tail :].sum(1)], 1)
        return _products(deltas, deltas), cut.cpu()

    def merged(self, merged: Tensor, deltas: Tensor) -> tuple[int, Tensor]:
        """Returns the nonzero count of a merged vector [r c], and its inner products with itself and deltas: [1+k]."""
        vectors = merged.unsqueeze(0)
        return int(merged.count_nonzero()), torch.cat([_products(vectors, vectors), _products(vectors, deltas)], 1)[0]

    def distinct_values(self, deltas: Tensor) -> list[Tensor]:
        """Returns the distinct nonzero float32 bit patterns of each vector of [k r c], in any order: int32."""
        patterns = deltas.flatten(1).contiguous().view(torch.int32)
        return [torch.unique(vector[vector & 0x7FFFFFFF != 0]).cpu() for vector in patterns]

    def endings(self, result: Tensor, base: Tensor | None, experts: Tensor) -> Tensor:
        """Counts the positions of [n] with the value of base [n] (or 0), of each expert [k n], of none: [k+2].

        A position that has the value of more than one input counts for the first.
        """
        ends, *inputs = (values.flatten().float() for values in (result, *experts))
        unassigned = ends != (0 if base is None else base.flatten().float())
        counts = [unassigned.numel() - unassigned.sum()]
        for values in inputs:
            equal = unassigned & (ends == values)
            counts.append(equal.sum())
            unassigned = unassigned ^ equal
        return torch.stack([*counts, unassigned.sum()]).cpu()


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
        count = call("count_merged", *arrays, len(deltas), merged.numel(), products)
        if count < 0:
            raise MemoryError
        return count, products

    def distinct_values(self, deltas: Tensor) -> list[Tensor]:
        """As `Counting.distinct_values`, by a hash table that grows when it is half full."""
        deltas = deltas.contiguous()
        k, n = len(deltas), deltas[0].numel()
        distinct, counts = torch.empty(k, n, dtype=torch.int32), torch.empty(k, dtype=torch.int64)
        high, bits = torch.empty(1 << 16, dtype=torch.uint8), 14
        while not call("different", deltas, k, n, high, _table(bits), bits, distinct, counts):
            bits += 2
        return [values[:count] for values, count in zip(distinct, counts.tolist(), strict=True)]

    def endings(self, result: Tensor, base: Tensor | None, experts: Tensor) -> Tensor:
        """As `Counting.endings`."""
        ends = torch.zeros(len(experts) + 2, dtype=torch.int64)
        arrays = (None if values is None else values.contiguous() for values in (result, base, experts))
        call(f"endings_{STORED[str(result.dtype)]}", *arrays, len(experts), result.numel(), ends)
        return ends


def _table(bits: int) -> Tensor:
    return torch.empty(1 << bits, dtype=torch.int32)


def _as_int64(counts: Tensor) -> Tensor:
    """Counts that are in float64 as whole numbers in host memory."""
    return counts.long().cpu()


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Returns inner products of float32 vectors [k n] and [m n] in float64, in host memory: [k m].

    On the CPU each lane is summed from its first number to its last, then the lanes, as in the compiled loops; a GPU
    adds in another order, so its last bits may differ.
    """
    sides = []
    for side in (left, right):
        values = side.flatten(1).double()
        rows = -(-values.shape[1] // LANES)
        padded = torch.nn.functional.pad(values, (0, rows * LANES - values.shape[1]))
        sides.append(padded.view(len(values), rows, LANES))
    if not len(sides[1]):
        return torch.zeros(len(sides[0]), 0, dtype=torch.float64)
    rows_of_sums = [
        torch.stack([_last_sum(_last_sum(left_vector * right_vector)) for right_vector in sides[1]])
        for left_vector in sides[0]
    ]
    return torch.stack(rows_of_sums).cpu()


def _last_sum(values: Tensor) -> Tensor:
    """The sum over the first axis, one after the other; 0 of nothing."""
    return values.cumsum(0)[-1] if len(values) else values.sum(0)


_NATIVE, _TORCH = NativeCounting(), Counting()


def of(*values: Tensor) -> Counting:
    """Returns the loops for these tensors, compiled if all of them have one dtype in memory that C can read."""
    first = values[0]
    is_readable = all(tensor.device.type == "cpu" and tensor.dtype == first.dtype for tensor in values)
    return _NATIVE if is_readable and stored_as(first.dtype) is not None else _TORCH
