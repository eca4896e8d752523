"""The loops that count what task vectors keep and share, twice with the same results: compiled, and in numpy.

A position is kept where a vector is not zero. Shapes: k experts, r rows, c columns, n elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.kernels.native import _SUFFIX, _call, has, takes

if TYPE_CHECKING:
    from torch import Tensor

LANES = 16
"""Sums that run side by side in an inner product; whoever adds in another order gets other bits."""


class Counting:
    """The loops in numpy, for tensors of any device."""

    def pairs(self, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of [k n] that two experts keep [k k], with different signs [k k], that 0, 1, .. k keep [k+1]."""
        import numpy

        values = deltas.flatten(1).cpu().numpy()
        kept, negative = values != 0, values < 0
        k = len(values)
        both, opposed = numpy.zeros((2, k, k), "int64")
        for i in range(k):
            for j in range(k):
                shared = kept[i] & kept[j]
                both[i, j] = numpy.count_nonzero(shared)
                opposed[i, j] = numpy.count_nonzero(shared & (negative[i] ^ negative[j]))
        holders = numpy.bincount(kept.sum(0), minlength=k + 1)
        return torch.from_numpy(both), torch.from_numpy(opposed), torch.from_numpy(holders)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products of float32 vectors [k n] and [m n] in float64: [k m]."""
        import numpy

        sides = []
        for side in (left, right):
            values = side.flatten(1).cpu().double().numpy()
            sides.append(numpy.pad(values, [(0, 0), (0, -values.shape[1] % LANES)]).reshape(len(values), -1, LANES))
        sums = [[(one * other).sum(0) for other in sides[1]] for one in sides[0]]  # row after row, as numpy adds these
        return torch.tensor([[sum(lanes.tolist()) for lanes in row] for row in sums], dtype=torch.float64)

    def lines(self, deltas: Tensor, first: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of [k r c] that each row keeps [k r], each column [k c], each block of ``size`` elements [k b].

        Element 0 is number ``first`` of the first block, of which there may be no more; so may the last be cut.
        """
        import numpy

        kept = deltas.cpu().numpy() != 0
        flat = kept.reshape(len(kept), -1)
        whole = numpy.pad(flat, [(0, 0), (first, -(first + flat.shape[1]) % size)]).reshape(len(kept), -1, size)
        counts = (numpy.count_nonzero(each, axis=axis) for each, axis in ((kept, 2), (kept, 1), (whole, 2)))
        by_row, by_column, by_block = (torch.from_numpy(each.astype("int32")) for each in counts)
        return by_row, by_column, by_block

    def different(self, values: Tensor) -> Tensor:
        """The different bit patterns among float32 values [n] other than zeros, in any order: int32."""
        import numpy

        patterns = values.flatten().cpu().contiguous().view(torch.int32).numpy()
        return torch.from_numpy(numpy.unique(patterns[patterns & 0x7FFFFFFF != 0]))

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
    """The loops in native.c, for tensors in the memory of the CPU."""

    def pairs(self, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Counting.pairs`."""
        deltas = deltas.contiguous()
        k = len(deltas)
        both, opposed = torch.zeros(2, k, k, dtype=torch.int64)
        holders = torch.zeros(k + 1, dtype=torch.int64)
        if not _call("count_pairs", deltas, k, deltas[0].numel(), both, opposed, holders):
            raise MemoryError
        return both, opposed, holders

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """As `Counting.products`."""
        left, right = left.contiguous(), right.contiguous()
        out = torch.empty(len(left), len(right), dtype=torch.float64)
        _call("products", left, len(left), right, len(right), left[0].numel(), out)
        return out

    def lines(self, deltas: Tensor, first: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `Counting.lines`."""
        deltas = deltas.contiguous()
        k, r, c = deltas.shape
        blocks = -(-(first + r * c) // size)
        counts = [torch.zeros(k, n, dtype=torch.int32) for n in (r, c, blocks)]
        _call("count_lines", deltas, k, r, c, first, size, blocks, *counts)
        by_row, by_column, by_block = counts
        return by_row, by_column, by_block

    def different(self, values: Tensor) -> Tensor:
        """As `Counting.different`; in a table that is made larger whenever more than half of it is taken."""
        values = values.contiguous()
        found = torch.empty(values.numel(), dtype=torch.int32)
        known, bits = -1, 12
        while known < 0:
            bits += 2
            known = _call("gather", values, values.numel(), torch.zeros(1 << bits, dtype=torch.int32), bits, found, 0)
        return found[:known].clone()

    def endings(self, result: Tensor, base: Tensor | None, experts: Tensor) -> Tensor:
        """As `Counting.endings`."""
        ends = torch.zeros(len(experts) + 2, dtype=torch.int64)
        arrays = (None if each is None else each.contiguous() for each in (result, base, experts))
        _call(f"endings_{_SUFFIX[str(result.dtype)]}", *arrays, len(experts), result.numel(), ends)
        return ends


_NATIVE, _NUMPY = NativeCounting(), Counting()


def of(*values: Tensor) -> Counting:
    """The loops for these tensors, compiled where all of them are of one dtype in memory that C can read."""
    first = values[0]
    plain = all(each.device.type == "cpu" and each.dtype == first.dtype for each in values)
    return _NATIVE if plain and has("count_pairs") and takes(first.dtype) else _NUMPY
