"""The loops in torch: what the compiled ones do, on any device, bit for bit.

Shapes: k experts, r rows, c columns; [n] is any shape, in one piece or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 0x7FFFFFFF  # the bits of a float32 but its sign
HIGH = 1 << 15  # values of the high half of a non-negative float32
LOW = 1 << 16


class Reference:
    """The loops over tensors of any device and dtype."""

    def difference(self, stored: Tensor, refuse: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Base [r c] and deltas [k r c] in float32 of what is ``stored`` [1+k r c].

        ``refuse`` is called where they are not finite, and raises.
        """
        values = stored.to(torch.float32, copy=True)
        base, deltas = values[0], values[1:].sub_(values[0])
        if not (torch.isfinite(base).all() and torch.isfinite(deltas).all()):
            refuse()
        return base, deltas

    def restored(self, stored: Tensor, base: Tensor, deltas: Tensor, delta: Tensor) -> tuple[Tensor, bool]:
        """base + delta [r c] rounded to the dtype of ``stored``; its bits where delta is zero or exactly one expert's.

        Where several experts have that delta the last one's bits are taken. Also says whether all is finite.
        """
        merged = (base + delta).to(stored.dtype)
        for expert, change in zip(stored[1:], deltas, strict=True):
            merged = torch.where(delta == change, expert, merged)
        merged = torch.where(delta == 0, stored[0], merged)
        return merged, bool(torch.isfinite(merged).all())

    def keys_of(self, scores: Tensor) -> Tensor:
        """Scores as integers that sort as the scores do by size, once their sign bit is masked: int32 [k n]."""
        return scores.float().contiguous().view(torch.int32)

    def tally_high(self, keys: Tensor, free: Tensor | None, into: Tensor) -> None:
        """Counts how often each high half of a key occurs among the ``free`` ones of an expert: int64 [k 32768]."""
        for row, tally in zip(_free_ones(keys, free), into, strict=True):
            tally += torch.bincount(row >> 16, minlength=HIGH).to(tally.device)

    def tally_low(self, keys: Tensor, free: Tensor | None, buckets: list[int], into: Tensor) -> None:
        """Counts how often each low half occurs among the free keys with the expert's high half: int64 [k 65536]."""
        for row, bucket, tally in zip(_free_ones(keys, free), buckets, into, strict=True):
            tally += torch.bincount(row[row >> 16 == bucket] & 0xFFFF, minlength=LOW).to(tally.device)

    def tally_near(self, keys: Tensor, free: Tensor | None, first: list[int], into: Tensor) -> None:
        """Counts each free key from an expert's ``first`` on, as many as there is room for: int64 [k 1+..].

        Before these, how many are above them.
        """
        for row, start, tally in zip(_free_ones(keys, free), first, into, strict=True):
            width = len(tally) - 1
            in_range = row[(row >= start) & (row < start + width)] - start
            tally[0] += (row >= start + width).sum().to(tally.device)
            tally[1:] += torch.bincount(in_range, minlength=width).to(tally.device)

    def count_equal(self, keys: Tensor, free: Tensor | None, last: list[int]) -> Tensor:
        """How many free keys of each expert are exactly its ``last``: int64 [k]."""
        rows = zip(_free_ones(keys, free), last, strict=True)
        return torch.tensor([int((row == key).sum()) for row, key in rows])

    def mark_top(self, keys: Tensor, free: Tensor | None, last: list[int], room: list[int]) -> Tensor:
        """Marks the free keys above ``last``, and the first ``room`` of those that equal it: bool [k n]."""
        mask = torch.empty_like(keys, dtype=torch.bool)
        for k, (row, level, space) in enumerate(zip(keys & SIZE, last, room, strict=True)):
            equal = row == level if free is None else (row == level) & free[k]
            above = row > level if free is None else (row > level) & free[k]
            first = equal.flatten().cumsum(0, dtype=torch.int32).view_as(equal) <= space
            mask[k] = above | (equal & first)
        return mask

    def top_of_rows(self, scores: Tensor, counts: Tensor, free: Tensor) -> Tensor:
        """Each row's ``counts`` [k r] highest free scores [k r c], all the free ones where there are fewer.

        Equal scores go to the lower column. Returns bool [k r c].
        """
        barred = torch.where(free, scores.float().abs(), -1.0)
        counts = torch.minimum(counts, free.sum(-1)).unsqueeze(-1)
        last = barred.sort(-1).values.gather(-1, (barred.shape[-1] - counts).clamp(max=barred.shape[-1] - 1))
        above, equal = barred > last, barred == last
        room = counts - above.sum(-1, keepdim=True)
        mask = above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
        return mask & (counts > 0)

    def top_of_blocks(self, scores: Tensor, n: int, m: int, free: Tensor | None, tail: int) -> Tensor:
        """The ``n`` highest free scores [k r c] of every ``m`` elements, ``tail`` of a shorter last block: bool."""
        return blocks_as_rows(self.top_of_rows, scores, n, m, free, tail)

    def ranks_of_rows(self, scores: Tensor) -> Tensor:
        """Each element's place in its row [k r c] as float32, 0 for the highest score; equal scores rank by column."""
        places = (self.keys_of(scores) & SIZE).sort(dim=-1, descending=True, stable=True).indices
        columns = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float32)
        return torch.empty_like(places, dtype=torch.float32).scatter_(-1, places, columns.expand_as(places))

    def at_least(self, values: Tensor, limits: Tensor) -> Tensor:
        """Where a value is as large as its limit or larger; they may differ in form as in torch."""
        return values >= limits

    def keep(self, deltas: Tensor, mask: Tensor) -> Tensor:
        """The deltas where ``mask`` is true, +0 elsewhere. [n]"""
        return torch.where(mask, deltas, 0)

    def weighted_sum(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """The sum of deltas [k r c] times weights [k], always in the experts' order: [r c].

        torch's own sum over five or more associates by the slice's shape, so its last bit would depend on how a tensor
        was cut.
        """
        total = deltas[0] * weights[0]
        for delta, weight in zip(deltas[1:], weights[1:], strict=True):
            total += delta * weight
        return total

    def anchored_sum(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """The first delta, and of the others [k r c] what they add to it times their weights [k]: [r c]."""
        total = deltas[0].clone()
        for delta, weight in zip(deltas[1:], weights[1:], strict=True):
            total += (delta - deltas[0]) * weight
        return total

    def mean_of_agreeing(self, deltas: Tensor, elected: Tensor, weights: Tensor) -> Tensor:
        """The mean by weights [k] of the deltas [k r c] that have the sign of ``elected`` [r c], or 0: [r c]."""
        sign = elected.sign()
        shares = torch.where((deltas.sign() == sign) & (sign != 0), weights.view(-1, 1, 1), 0)
        total = self.weighted_sum(shares, torch.ones_like(weights))
        shares = shares / total.masked_fill(total == 0, 1)
        return self.weighted_sum(deltas * shares, torch.ones_like(weights))

    def uniforms(self, key: bytes, start: int, shape: Sequence[int], *, double: bool) -> Tensor:
        """Uniforms in [0, 1) from number ``start`` on of the Philox4x64-10 stream of a key of 16 bytes, in this form.

        float32 takes 24 bits of each 32-bit half, low half first; float64 takes 53 of each word.
        """
        import numpy

        bits = numpy.random.Philox(key=numpy.frombuffer(key, "<u8"))
        lanes = 4 if double else 8  # uniforms in one 256-bit step of the counter
        bits.advance(start // lanes)
        skip = start % lanes
        dtype = numpy.float64 if double else numpy.float32
        drawn = numpy.random.Generator(bits).random(skip + math.prod(shape), dtype=dtype)[skip:]
        return torch.from_numpy(drawn).view(*shape)


def blocks_as_rows(
    top_of_rows: Callable[[Tensor, Tensor, Tensor], Tensor],
    scores: Tensor,
    n: int,
    m: int,
    free: Tensor | None,
    tail: int,
) -> Tensor:
    """`Reference.top_of_blocks` by a selection in rows, of which each block is one."""
    k, size = scores.shape[0], scores[0].numel()
    padding = -size % m
    free = torch.ones_like(scores, dtype=torch.bool) if free is None else free.expand_as(scores)
    flat = torch.nn.functional.pad(scores.flatten(1), (0, padding)).view(k, -1, m)
    open_ = torch.nn.functional.pad(free.flatten(1), (0, padding)).view(k, -1, m)
    counts = torch.full(flat.shape[:2], n, device=scores.device)
    if padding:
        counts[:, -1] = tail
    return top_of_rows(flat, counts, open_).flatten(1)[:, :size].view(scores.shape)


def _free_ones(keys: Tensor, free: Tensor | None) -> list[Tensor]:
    """Each expert's free keys, without the bit of the sign."""
    return [row.flatten() if free is None else row[free[k]] for k, row in enumerate(keys & SIZE)]
