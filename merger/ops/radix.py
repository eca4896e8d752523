"""Radix selection: the key of the last element that a selection takes, from counts of keys over all slices.

A float32 without its sign sorts as its own bit pattern, its key. One tally of the keys' high 16 bits finds the bucket
of the last key, and one of the low 16 bits within the bucket finds the key itself. Where a sample of the tensor tells
near which keys the last one lies, one tally of the keys near it finds the same.

Shapes: k experts, r rows, c columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from merger._lazy import torch
from merger.ops import kernels
from merger.ops.kernels.interface import Loops
from merger.ops.questions import Answers, Flow, Key, PrefixSum, Question, Size, Sum, Total, Whole

if TYPE_CHECKING:
    from torch import Tensor

MARGIN = 1 / 200
"""The error of a sample's cut to each side: a share of sqrt(above * below), as the error grows with that."""
NEAR = 10
"""The most buckets whose keys are tallied one by one."""


# --- questions of a selection ---------------------------------------------------------------------


@dataclass(frozen=True)
class Tally(Total["Tensor"]):
    """Asks for counts over all slices, which ``add`` adds to int64 counters of this shape.

    The answer is the result of ``finish`` on the counts.
    """

    add: Callable[[Tensor], None]
    counters: tuple[int, ...]
    scope: Whole
    finish: Callable[[Tensor], object]

    def part(self, counters: list[Tensor]) -> None:
        """Adds this slice's counts to counters that no other thread uses meanwhile."""
        try:
            free = counters.pop()
        except IndexError:
            free = torch.zeros(self.counters, dtype=torch.int64)
        self.add(free)
        counters.append(free)

    def join(self, total: Tensor, part: Tensor) -> Tensor:
        """Returns the sum of the counts."""
        return total + part

    def answer(self, total: Tensor) -> object:
        """Returns the result of ``finish``."""
        return self.finish(total)


@dataclass(frozen=True)
class SampleHint(Question):
    """Asks for the note that a flow over a sample of the tensor made; None if there was none.

    The hint may only decide which question is asked next, never the result. The whole model has no sample.
    """

    scope: Whole

    def reply(self, answers: Answers, key: Key, i: int) -> Sequence[object] | None:
        """Returns the note with the hint's number."""
        return answers.sample_note(key[2]) if self.scope == "tensor" else None


@dataclass(frozen=True)
class SampleNote(Question):
    """Notes values for the hint of the same number, in case that this flow runs over a sample."""

    values: Sequence[object]
    scope: Whole

    def reply(self, answers: Answers, key: Key, i: int) -> None:
        """Keeps the values."""
        if self.scope == "tensor":
            answers.note(key[2], self.values)


# --- the top of a score ---------------------------------------------------------------------------


class Cut(NamedTuple):
    """Where a selection ends, for each expert."""

    last: list[int]  # the bin, or the key, of the last element that is taken
    room: list[int]  # how many elements of that bin are taken
    size: list[int]  # how many elements that bin holds


def top(scores: Tensor, free: Tensor | None, counts: list[int], scope: Whole) -> Flow[Tensor]:
    """The ``counts[k]`` free positions of the largest scores, or all of them where there are fewer.

    ``scores`` [k r c] rank by their size as float32, ``free`` is bool [k r c]. Equal scores go to the lower flat index.
    Returns bool [k r c].
    """
    loops = kernels.of(scores.float())
    keys = loops.keys_of(scores)
    cut = yield from _cut(loops, keys, free, counts, scope)
    if cut.room == cut.size:
        return loops.mark_top(keys, free, cut.last, cut.room)
    sums = yield PrefixSum(partial(loops.count_equal, keys, free, cut.last), scope)
    room = [space - count for space, count in zip(cut.room, sums.tolist(), strict=True)]
    return loops.mark_top(keys, free, cut.last, room)


def nested_tops(scores: Tensor, counts: Sequence[Sequence[int]]) -> Flow[Tensor]:
    """Counts the selections that take each position of a slice [k r c]: uint8.

    Selection i takes the ``counts[i][k]`` largest scores of the tensor, as `top` does; one walk serves all.
    """
    loops = kernels.of(scores.float())
    keys = loops.keys_of(scores)
    cuts, _ = yield from _cuts(loops, keys, None, counts, "tensor")
    counts_before = yield PrefixSum(lambda: torch.stack([loops.count_equal(keys, None, cut.last) for cut in cuts]))
    levels = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for cut, cut_counts in zip(cuts, counts_before.tolist(), strict=True):
        room = [space - count for space, count in zip(cut.room, cut_counts, strict=True)]
        levels += loops.mark_top(keys, None, cut.last, room)
    return levels


def _cut(loops: Loops[Tensor], keys: Tensor, free: Tensor | None, counts: list[int], scope: Whole) -> Flow[Cut]:
    """The key of the last element that each expert takes."""
    experts = len(keys)
    ranges: list[range] | None = yield SampleHint(scope)
    if ranges is not None and None not in ranges:
        tally_near = partial(loops.tally_near, keys, free, [keys_near.start for keys_near in ranges])
        shape = experts, 1 + max(map(len, ranges))
        cut: Cut | None = yield Tally(tally_near, shape, scope, partial(_cut_near, counts, ranges))
        if cut is not None:
            return cut
    cuts, near_keys = yield from _cuts(loops, keys, free, [counts], scope)
    yield SampleNote(near_keys, scope)
    return cuts[0]


def _cuts(
    loops: Loops[Tensor], keys: Tensor, free: Tensor | None, counts: Sequence[Sequence[int]], scope: Whole
) -> Flow[tuple[list[Cut], list[range | None]]]:
    """The cuts of several selections, ``counts[i][k]`` each, and the keys near the first; two tallies serve all."""
    experts = len(keys)
    high = partial(loops.tally_high, keys, free)
    buckets, ranges = yield Tally(high, (experts, kernels.HIGH), scope, partial(_buckets, counts))

    def tally_low(counters: Tensor) -> None:
        for bucket, tally in zip(buckets, counters, strict=True):
            loops.tally_low(keys, free, bucket.last, tally)

    shape = len(counts), experts, kernels.LOW
    cuts: list[Cut] = yield Tally(tally_low, shape, scope, partial(_cuts_within, buckets))
    return cuts, ranges


def cut_of(counts: Sequence[int], tally: Tensor) -> Cut:
    """The bin of the ``counts[k]``-th element from the top; ``tally`` is [k bins].

    Where the tally has fewer elements all are taken; where the count is 0 it is the last bin, and none of it.
    """
    above = tally.flip(1).cumsum(1)
    target = torch.tensor(counts, device=tally.device).view(-1, 1).minimum(above[:, -1:])
    steps = torch.searchsorted(above, target)
    bins = tally.shape[1] - 1 - steps
    sizes = tally.gather(1, bins)
    room = target - (above.gather(1, steps) - sizes)
    return Cut(bins.flatten().tolist(), room.flatten().tolist(), sizes.flatten().tolist())


def _buckets(counts: Sequence[Sequence[int]], tally: Tensor) -> tuple[list[Cut], list[range | None]]:
    """Each selection's cut among the high halves, and of the first the keys that `MARGIN` reaches to both sides."""
    cuts = [cut_of(selection, tally) for selection in counts]
    totals = tally.sum(1).tolist()
    margins = [int(MARGIN * math.sqrt(max(0, n * (total - n)))) for n, total in zip(counts[0], totals, strict=True)]
    highest = cut_of([max(0, n - margin) for n, margin in zip(counts[0], margins, strict=True)], tally).last
    lowest = cut_of([n + margin for n, margin in zip(counts[0], margins, strict=True)], tally).last
    return cuts, [_keys_around(*bins) for bins in zip(tally, cuts[0].last, lowest, highest, strict=True)]


def _keys_around(tally: Tensor, bucket: int, low: int, high: int) -> range | None:
    """The keys of at most `NEAR` buckets around one, of those from ``low`` to ``high``.

    None where more of these hold elements; changes to bf16 weights have few values, far from each other.
    """
    if int(tally[low : high + 1].count_nonzero()) > NEAR:
        return None
    return range(max(low, bucket - NEAR // 2) << 16, (min(high, bucket + NEAR // 2) + 1) << 16)


def _cut_within(buckets: Cut, tally: Tensor) -> Cut:
    """The cut in whole keys, given the buckets and a tally of the low halves within them."""
    low = cut_of(buckets.room, tally)
    return low._replace(last=[bucket << 16 | key for bucket, key in zip(buckets.last, low.last, strict=True)])


def _cuts_within(buckets: Sequence[Cut], tallies: Tensor) -> list[Cut]:
    """Each selection's cut in whole keys; ``tallies`` is [selections k bins]."""
    return [_cut_within(bucket, tally) for bucket, tally in zip(buckets, tallies, strict=True)]


def _cut_near(counts: Sequence[int], ranges: Sequence[range], tally: Tensor) -> Cut | None:
    """The cut in whole keys; ``tally`` has the number of keys above each range, then that of each key in it.

    None where the last key of some expert is outside its range.
    """
    remaining = [n - above for n, above in zip(counts, tally[:, 0].tolist(), strict=True)]
    low = tally[:, 1:].view(len(tally), -1, kernels.LOW)
    high = low.sum(2)
    if any(not 0 <= n <= total for n, total in zip(remaining, high.sum(1).tolist(), strict=True)):
        return None
    buckets = cut_of(remaining, high)
    cut = _cut_within(buckets, low[range(len(low)), buckets.last])
    return cut._replace(last=[keys.start + key for keys, key in zip(ranges, cut.last, strict=True)])


# --- order statistics -----------------------------------------------------------------------------


def ordered(values: Tensor, places: Sequence[Sequence[int]], scope: Whole) -> Flow[Tensor]:
    """The values at ``places[k]`` of each expert's ascending order, 0 being the lowest.

    ``values`` is [k r c]; every expert has the same number p of places. Returns [p k 1 1].
    """
    size = yield Size(scope)
    bits = values.float().contiguous().view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # a negative float32 sorts in reverse
    high = (keys >> 16) + 32768
    experts = [k for k, row in enumerate(places) for _ in row]
    from_top = [size - place for row in places for place in row]
    tally = yield Sum(_histogram(high, 65536), scope)
    buckets = cut_of(from_top, tally[experts])
    low = [_low_halves(keys[k], high[k], bucket) for k, bucket in zip(experts, buckets.last, strict=True)]
    levels = yield Sum(_histogram(low, 65536), scope, partial(cut_of, buckets.room))
    pairs = zip(buckets.last, levels.last, strict=True)
    ordered_keys = keys.new_tensor([(bucket - 32768) << 16 | level for bucket, level in pairs])
    ordered_values = (ordered_keys ^ ((ordered_keys >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return ordered_values.view(len(places), -1, 1, 1).transpose(0, 1)


def _histogram(bins: Iterable[Tensor], size: int) -> Tensor:
    """Counts of the whole numbers below ``size``, per expert: [k size]."""
    return torch.stack([torch.bincount(row.flatten(), minlength=size) for row in bins])


def _low_halves(keys: Tensor, high: Tensor, bucket: int) -> Tensor:
    """The low halves of the keys in a bucket. NumPy makes the mask eight times as fast as torch."""
    if keys.device.type != "cpu":
        return keys[high == bucket] & 0xFFFF
    return torch.from_numpy(keys.numpy()[high.numpy() == bucket] & 0xFFFF)
