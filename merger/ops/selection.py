"""Selection: the top of a score, as a count and never as a threshold; exact at any scope, equal ones in flat order.

It is written once, as a flow of questions about the whole, so every method that keeps the largest of something never
needs a whole tensor in memory.

Shapes: k experts, r rows, c columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops import kernels
from merger.ops.arithmetic import RatioOf, count
from merger.ops.questions import Before, Flow, Found, Guess, Scope, Size, Sum, Tally, Whole

if TYPE_CHECKING:
    from torch import Tensor

Bins = tuple[list[int], list[int], list[int]]
"""Each expert's place among some, how many of it are to be taken, how many there are."""


def select(
    scores: Tensor,
    density: Sequence[Fraction],
    *,
    scope: Scope = "tensor",
    order: Sequence[int] | None = None,
    eligible: Tensor | None = None,
    ratio_of: RatioOf = "total",
) -> Flow[Tensor]:
    """The mask of each expert's highest scores; equal scores go to the lower flat index.

    ``scores`` [k r c] rank by their size, compared as float32; ``density`` is the kept share of each
    expert, as a count that is rounded down. With an ``order`` each expert chooses only among
    positions that earlier ones left free, so the masks are disjoint. ``eligible`` [k r c] bars
    positions from the start. Returns bool [k r c].
    """
    take = partial(_take, scores, density, scope, ratio_of)
    return (yield from (take(slice(None), eligible) if order is None else in_turn(order, eligible, take)))


def in_turn(
    order: Sequence[int], eligible: Tensor | None, take: Callable[[slice, Tensor | None], Flow[Tensor]]
) -> Flow[Tensor]:
    """The masks of experts who choose one after the other: ``take`` is told who, and what is free (None: all)."""
    kept: dict[int, Tensor] = {}
    taken: Tensor | None = None
    for own in order:
        mine = slice(own, own + 1)
        free = None if eligible is None else eligible[mine]
        if taken is not None:
            free = (~taken)[None] if free is None else free & ~taken
        (kept[own],) = yield from take(mine, free)
        taken = kept[own] if taken is None else taken | kept[own]
    return torch.stack([kept[own] for own in range(len(kept))])


def _take(
    scores: Tensor, density: Sequence[Fraction], scope: Scope, ratio_of: RatioOf, who: slice, free: Tensor | None
) -> Flow[Tensor]:
    """The top ``density`` of some experts' ``scores`` among their ``free`` positions."""
    scores, density = scores[who], density[who]
    if scope == "row":
        open_ = torch.ones_like(scores, dtype=torch.bool) if free is None else free
        sizes = open_.sum(-1) if ratio_of == "remaining" else torch.full(scores.shape[:2], scores.shape[-1])
        pairs = zip(density, sizes.tolist(), strict=True)
        rows = torch.tensor([[count(share, n) for n in row] for share, row in pairs])
        return top_of_rows(scores, rows.to(scores.device), open_)
    if ratio_of == "remaining" and free is not None:
        of = (yield Sum(partial(_counts, free), scope)).tolist()
    else:
        of = [(yield Size(scope))] * len(density)
    return (yield from _top(scores, free, [count(share, n) for share, n in zip(density, of, strict=True)], scope))


MARGIN = 1 / 200
"""By how much a sample's cut may be off to each side: a share of sqrt(above * below), as its error grows with that."""
NEAR = 10
"""The most buckets whose keys are tallied one by one."""


def _top(scores: Tensor, free: Tensor | None, wanted: list[int], scope: Whole) -> Flow[Tensor]:
    """Exactly ``wanted[k]`` of the free positions, or all of them: a radix selection on the bits.

    A float32 without its sign sorts as its own bit pattern, its key. One tally of the keys' high 16 bits finds
    the bucket of the last one taken, one of the low 16 bits within it finds its exact value, and
    the equal ones are handed out in flat order (methods.md 0.4). Where a sample says near which keys the last one
    is, one tally of these finds the same.
    """
    loops = kernels.of(scores.float())
    keys = loops.keys_of(scores)
    k = len(keys)
    around: list[range] | None = yield Guess(scope)
    found: Bins | None = None
    if around is not None and None not in around:
        near = partial(loops.tally_near, keys, free, [each.start for each in around])
        found = yield Tally(near, (k, 1 + max(map(len, around))), scope, partial(_descend_near, wanted, around))
    if found is None:
        high = partial(loops.tally_high, keys, free)
        (buckets, left, _), around = yield Tally(high, (k, kernels.HIGH), scope, partial(_descend_around, wanted))
        yield Found(around)
        low = partial(loops.tally_low, keys, free, buckets)
        found = yield Tally(low, (k, kernels.LOW), scope, partial(_descend_within, buckets, left))
    last, left, equal = found
    if left == equal:
        return loops.mark_top(keys, free, last, equal)
    before = yield Before(partial(loops.count_equal, keys, free, last), scope)
    return loops.mark_top(keys, free, last, [n - b for n, b in zip(left, before.tolist(), strict=True)])


def _counts(masks: Tensor) -> Tensor:
    """How many are true for each expert: [k]."""
    if masks.device.type != "cpu":
        return masks.flatten(1).sum(1)
    import numpy

    return torch.tensor([numpy.count_nonzero(each) for each in masks.numpy()])


def _descend(wanted: Sequence[int], tally: Tensor) -> Bins:
    """Per expert the bin that holds the ``wanted``-th from the top, how many of it to take, how many it has.

    ``tally`` is [k bins]; where it has fewer all are taken. Where nothing is wanted: the last bin, none of it.
    """
    above = tally.flip(1).cumsum(1)
    target = torch.tensor(wanted, device=tally.device).view(-1, 1).minimum(above[:, -1:])
    steps = torch.searchsorted(above, target)
    bins = tally.shape[1] - 1 - steps
    there = tally.gather(1, bins)
    left = target - (above.gather(1, steps) - there)
    return bins.flatten().tolist(), left.flatten().tolist(), there.flatten().tolist()


def _descend_around(wanted: Sequence[int], tally: Tensor) -> tuple[Bins, list[range | None]]:
    """As `_descend` among high halves, and for each expert the keys of the bins that `MARGIN` reaches to both sides."""
    there = tally.sum(1).tolist()
    margins = [int(MARGIN * math.sqrt(max(0, n * (of - n)))) for n, of in zip(wanted, there, strict=True)]
    highest, _, _ = _descend([max(0, n - more) for n, more in zip(wanted, margins, strict=True)], tally)
    lowest, _, _ = _descend([n + more for n, more in zip(wanted, margins, strict=True)], tally)
    found = _descend(wanted, tally)
    several = zip(tally, found[0], lowest, highest, strict=True)
    return found, [_around(own, bucket, low, high) for own, bucket, low, high in several]


def _around(tally: Tensor, bucket: int, low: int, high: int) -> range | None:
    """The keys of at most `NEAR` buckets around one, of those from ``low`` to ``high`` that the last one may be in.

    None where it may be in more, but for empty ones: changes to bf16 weights have few values, far from each other.
    """
    if int(tally[low : high + 1].count_nonzero()) > NEAR:
        return None
    return range(max(low, bucket - NEAR // 2) << 16, (min(high, bucket + NEAR // 2) + 1) << 16)


def _descend_within(buckets: Sequence[int], wanted: Sequence[int], tally: Tensor) -> Bins:
    """As `_descend` among the low halves in these buckets, but with whole keys."""
    levels, left, there = _descend(wanted, tally)
    return [bucket << 16 | level for bucket, level in zip(buckets, levels, strict=True)], left, there


def _descend_near(wanted: Sequence[int], around: Sequence[range], tally: Tensor) -> Bins | None:
    """As `_descend` with whole keys, given how many are above those near, and how often each of these occurs.

    None where somebody's last one is not among them.
    """
    inside = [n - above for n, above in zip(wanted, tally[:, 0].tolist(), strict=True)]
    low = tally[:, 1:].view(len(tally), -1, kernels.LOW)
    high = low.sum(2)
    if any(not 0 <= n <= there for n, there in zip(inside, high.sum(1).tolist(), strict=True)):
        return None
    buckets, left, _ = _descend(inside, high)
    last, left, there = _descend_within(buckets, left, low[range(len(low)), buckets])
    return [near.start + key for near, key in zip(around, last, strict=True)], left, there


# --- orders ---------------------------------------------------------------------------------------


def ordered(values: Tensor, places: Sequence[Sequence[int]], scope: Whole) -> Flow[Tensor]:
    """The values at ``places[k]`` of each expert's ascending order, 0 being the lowest: [p k 1 1].

    A float32 without its sign sorts as its own bit pattern; a negative one in reverse.
    """
    size = yield Size(scope)
    bits = values.float().contiguous().view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    high = (keys >> 16) + 32768
    each = [(k, size - place) for k, own in enumerate(places) for place in own]
    tally = yield Sum(_histogram(high, 65536), scope)
    buckets, left, _ = _descend([from_top for _, from_top in each], tally[[k for k, _ in each]])
    low = [_low_halves(keys[k], high[k], own) for (k, _), own in zip(each, buckets, strict=True)]
    levels, _, _ = yield Sum(_histogram(low, 65536), scope, partial(_descend, left))
    found = keys.new_tensor([(own - 32768) << 16 | level for own, level in zip(buckets, levels, strict=True)])
    found = (found ^ ((found >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return found.view(len(places), -1, 1, 1).transpose(0, 1)


def _histogram(bins: Iterable[Tensor], size: int) -> Tensor:
    """How often each of ``size`` whole numbers occurs, per expert: [k, size]."""
    return torch.stack([torch.bincount(each.flatten(), minlength=size) for each in bins])


def _low_halves(keys: Tensor, high: Tensor, bucket: int) -> Tensor:
    """The low halves of the keys in a bucket. torch's own comparison makes a mask eight times as slowly as numpy's."""
    if keys.device.type != "cpu":
        return keys[high == bucket] & 0xFFFF
    return torch.from_numpy(keys.numpy()[high.numpy() == bucket] & 0xFFFF)


# --- rows, blocks, and masks of several experts ----------------------------------------------------


def top_of_rows(scores: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
    """Each row's ``wanted`` [k r] highest free scores (all the free ones where there are fewer).

    ``scores`` [k r c] is non-negative; equal scores go to the lower column. Returns bool [k r c].
    """
    return kernels.of(scores.float()).top_of_rows(scores, wanted, free)


def ranks_of_rows(scores: Tensor) -> Tensor:
    """Each element's place in its row, 0 for the highest score; equal scores rank by column. [k r c]"""
    return kernels.of(scores.float()).ranks_of_rows(scores)


def exclusive(masks: Tensor, order: Sequence[int]) -> Tensor:
    """The masks [k r c] with every position left to the first expert in ``order`` that holds it."""
    disjoint: dict[int, Tensor] = {}
    taken: Tensor | None = None
    for k in order:
        disjoint[k] = masks[k] if taken is None else masks[k] & ~taken
        taken = masks[k] if taken is None else taken | masks[k]
    return torch.stack([disjoint[k] for k in range(len(masks))])


def top_of_blocks(scores: Tensor, n: int, m: int, free: Tensor | None, tail: int) -> Tensor:
    """The ``n`` highest free scores of every ``m`` consecutive elements of the flat slice (n:m).

    A last block that is shorter keeps ``tail``. A slice begins at a block's first element.
    """
    return kernels.of(scores.float()).top_of_blocks(scores, n, m, free, tail)
