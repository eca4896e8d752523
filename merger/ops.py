"""Tensor arithmetic that methods share: questions about a whole tensor, exact selection, draws.

A method sees one slice of one tensor at a time. What it must know of the whole it asks with a
``yield``: the flow stops there, the runner puts the question to every slice, and the flow goes on
with the answer; a tensor among the answers is on the CPU, where the parts of all slices meet, and `.to(deltas)`
takes it to where the slice is. Selection is written once, in terms of such questions, so every method that keeps
the largest of something is exact at any scope and never needs a whole tensor in memory.

Shapes: k experts, r rows, c columns; a vector is one row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from merger import kernels
from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["tensor", "row", "global"]
Whole = Literal["tensor", "global"]
RatioOf = Literal["total", "remaining"]
T = TypeVar("T")


@dataclass(frozen=True)
class _Asked:
    """What takes a pass to compute is given as a function: a flow that was started again need not call it."""

    of: Tensor | Callable[[], Tensor]
    scope: Whole = "tensor"

    @cached_property
    def value(self) -> Tensor:
        """This slice's part."""
        return self.of() if callable(self.of) else self.of

    def joined(self, total: Tensor | None) -> Tensor:
        """The value together with that of the slices before."""
        return self.value if total is None else total + self.value

    def answer(self, total: Tensor) -> Any:
        """What the flow is told when all is joined."""
        return total


@dataclass(frozen=True)
class Sum(_Asked):
    """Asks for the sum of a value over all slices of the tensor, or of all merged tensors.

    With ``then`` the answer is what that makes of the sum, worked out once for all slices.
    """

    then: Callable[[Tensor], Any] | None = None

    def answer(self, total: Tensor) -> Any:
        """The sum, or what ``then`` makes of it."""
        return total if self.then is None else self.then(total)


@dataclass(frozen=True)
class Tally:
    """Asks for counts over all slices, which ``add`` adds to int64 ``counters`` of this shape; else as `Sum`."""

    add: Callable[[Tensor], None]
    counters: tuple[int, ...]
    scope: Whole = "tensor"
    then: Callable[[Tensor], Any] | None = None

    def of_all(self, counts: Tensor) -> Sum:
        """The question when all slices have been counted."""
        return Sum(counts, self.scope, self.then)

    def answer(self, counts: Tensor) -> Any:
        """As of `Sum`."""
        return self.of_all(counts).answer(counts)


class Max(_Asked):
    """Asks for the largest value of all slices of the tensor, or of all merged tensors, each element by itself."""

    def joined(self, total: Tensor | None) -> Tensor:
        """The larger."""
        return self.value if total is None else torch.maximum(total, self.value)


class Before(_Asked):
    """Asks for the sum of counts over the slices that come before this one. Costs no pass."""


@dataclass(frozen=True)
class Size:
    """Asks how many elements the tensor, or all merged tensors together, have. Costs no pass."""

    scope: Whole = "tensor"


@dataclass(frozen=True)
class Guess:
    """Asks what a sample of the tensor was answered to the question that comes next; None if there was no such sample.

    It may only decide how that question is put, never what comes of it. Costs no pass. Nobody samples the whole model.
    """

    scope: Whole = "tensor"


Question = Sum | Tally | Max | Before | Size | Guess
Flow = Generator[Question, Any, T]
"""A computation over one slice that may ask about the whole; its return value is the result."""


def count(share: Fraction, of: int, *, up: bool = False) -> int:
    """How many of ``of`` elements a ratio selects: floor(share * of), exact (methods.md 0.3)."""
    return math.ceil(share * of) if up else math.floor(share * of)


def column(values: Sequence[Fraction], like: Tensor) -> Tensor:
    """One number per expert as a [k 1 1] tensor of ``like``'s dtype and device."""
    return torch.tensor([float(v) for v in values], dtype=like.dtype, device=like.device).view(-1, 1, 1)


def summed(terms: Tensor) -> Tensor:
    """The sum over the experts [k r c] -> [r c], always in their order.

    torch's own sum over five or more associates by the slice's shape, so its last bit would depend
    on how a tensor was cut.
    """
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def weighted_sum(deltas: Tensor, weights: Sequence[Fraction]) -> Tensor:
    """The sum over the experts of delta [k r c] times weight, in their order: [r c]."""
    return kernels.of(deltas).weighted_sum(deltas, column(weights, deltas).flatten())


def anchored_mean(deltas: Tensor, weights: Sequence[Fraction]) -> Tensor:
    """The weighted mean of the deltas [k r c], from the first on, so that equal ones come back bit for bit: [r c]."""
    total = sum(weights)
    return kernels.of(deltas).anchored_sum(deltas, column([w / total for w in weights], deltas).flatten())


def mean_of_agreeing(deltas: Tensor, elected: Tensor, weights: Tensor) -> Tensor:
    """The mean, by ``weights`` [k 1 1], of the deltas [k r c] that have the sign of ``elected`` [r c], or 0: [r c]."""
    return kernels.of(deltas).mean_of_agreeing(deltas, elected, weights.flatten())


def combined(vectors: Tensor, coefficients: Tensor) -> Tensor:
    """The sum of ``vectors`` [k r c] times ``coefficients`` [k] or [k . .], float64. [r c]

    It starts from the first, so that equal vectors come back bit for bit where the coefficients add up to 1.
    """
    several = coefficients if coefficients.dim() == 3 else coefficients.view(-1, 1, 1)
    merged = vectors[0] * summed(several).to(vectors)
    for vector, coefficient in zip(vectors[1:], several[1:].to(vectors), strict=True):
        merged += (vector - vectors[0]) * coefficient
    return merged


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean over the experts at each position by ``weights`` [k r c]; 0 where these add up to 0. [r c]"""
    together = summed(weights)
    return summed(values * (weights / together.masked_fill(together == 0, 1)))  # one alone has a share of exactly 1


def fast(operation: Literal["eq", "ge", "gt"], left: Tensor, right: Tensor) -> Tensor:
    """An operation that makes booleans.

    torch's CPU kernels for these are not vectorised: 0.8 ms for a million elements where numpy takes
    0.1, so on the CPU it is numpy's.
    """
    if left.device.type != "cpu":
        result: Tensor = getattr(torch, operation)(left, right)
        return result
    import numpy

    names = {"eq": "equal", "ge": "greater_equal", "gt": "greater"}
    return torch.from_numpy(getattr(numpy, names[operation])(left.numpy(), right.numpy()))


def keep(deltas: Tensor, kept: Tensor) -> Tensor:
    """The deltas where ``kept`` is true, zero elsewhere."""
    return kernels.of(deltas).keep(deltas, kept)


def _picked(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is true, as a vector."""
    return torch.from_numpy(values.numpy()[mask.numpy()]) if values.device.type == "cpu" else values[mask]


# --- selection: the top of a score, as a count and never as a threshold ---------------------------


def select(
    scores: Tensor,
    density: Sequence[Fraction],
    *,
    scope: Scope = "tensor",
    order: Sequence[int] | None = None,
    eligible: Tensor | None = None,
    ratio_of: RatioOf = "total",
    round_up: bool = False,
) -> Flow[Tensor]:
    """The mask of each expert's highest scores; equal scores go to the lower flat index.

    ``scores`` [k r c] rank by their size, compared as float32; ``density`` is the kept share of each
    expert, as a count that is rounded down. With an ``order`` each expert chooses only among
    positions that earlier ones left free, so the masks are disjoint. ``eligible`` [k r c] bars
    positions from the start. Returns bool [k r c].
    """
    if order is None:
        return (yield from _take(scores, eligible, density, scope, ratio_of, round_up))
    kept = torch.zeros_like(scores, dtype=torch.bool)
    free = torch.ones_like(kept[0])
    for k in order:
        mine = slice(k, k + 1)
        open_ = free[None] if eligible is None else eligible[mine] & free
        (kept[k],) = yield from _take(scores[mine], open_, density[mine], scope, ratio_of, round_up)
        free &= ~kept[k]
    return kept


def _take(
    scores: Tensor,
    free: Tensor | None,
    density: Sequence[Fraction],
    scope: Scope,
    ratio_of: RatioOf,
    round_up: bool,
) -> Flow[Tensor]:
    """The top ``density`` of each expert's ``scores`` among its ``free`` positions (None: all of them)."""
    if scope == "row":
        open_ = torch.ones_like(scores, dtype=torch.bool) if free is None else free
        sizes = open_.sum(-1) if ratio_of == "remaining" else torch.full(scores.shape[:2], scores.shape[-1])
        pairs = zip(density, sizes.tolist(), strict=True)
        rows = torch.tensor([[count(share, n, up=round_up) for n in row] for share, row in pairs])
        return top_of_rows(scores, rows.to(scores.device), open_)
    if ratio_of == "remaining" and free is not None:
        of = (yield Sum(partial(_counts, free), scope)).tolist()
    else:
        of = [(yield Size(scope))] * len(density)
    wanted = [count(share, n, up=round_up) for share, n in zip(density, of, strict=True)]
    return (yield from _top(scores, free, wanted, scope))


NEAR = 5
"""Buckets around the guessed one whose low halves are tallied in the first pass as well."""


def _top(scores: Tensor, free: Tensor | None, wanted: list[int], scope: Whole) -> Flow[Tensor]:
    """Exactly ``wanted[k]`` of the free positions, or all of them: a radix selection on the bits.

    A float32 without its sign sorts as its own bit pattern, its key. One tally of the keys' high 16 bits finds
    the bucket of the last one taken, one of the low 16 bits within it finds its exact value, and
    the equal ones are handed out in flat order (methods.md 0.4). Where a guess at the bucket was
    near enough, one pass makes both tallies.
    """
    loops = kernels.of(scores.float())
    keys = loops.keys_of(scores)
    k, high, low = len(keys), kernels.HIGH, kernels.LOW
    guess = yield Guess(scope)
    first = [0] * k if guess is None else [max(0, bucket - NEAR // 2) for bucket in guess[0]]
    bins = high if guess is None else high + NEAR * low
    tally = partial(loops.tally_high, keys, free, first)
    buckets, left, found = yield Tally(tally, (k, bins), scope, partial(_descend_near, wanted, first))
    if found is None:
        within = partial(loops.tally_low, keys, free, buckets)
        found = yield Tally(within, (k, low), scope, partial(_descend, left))
    levels, left, equal = found
    last = [bucket << 16 | level for bucket, level in zip(buckets, levels, strict=True)]
    if left == equal:
        return loops.mark_top(keys, free, last, equal)
    before = yield Before(partial(loops.count_equal, keys, free, last), scope)
    return loops.mark_top(keys, free, last, [n - b for n, b in zip(left, before.tolist(), strict=True)])


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
    inside = (fast("eq", high[k], high.new_tensor(own)) for (k, _), own in zip(each, buckets, strict=True))
    low = [_picked(keys[k], mask) & 0xFFFF for (k, _), mask in zip(each, inside, strict=True)]
    levels, _, _ = yield Sum(_histogram(low, 65536), scope, partial(_descend, left))
    found = keys.new_tensor([(own - 32768) << 16 | level for own, level in zip(buckets, levels, strict=True)])
    found = (found ^ ((found >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return found.view(len(places), -1, 1, 1).transpose(0, 1)


def _counts(masks: Tensor) -> Tensor:
    """How many are true for each expert: [k]."""
    if masks.device.type != "cpu":
        return masks.flatten(1).sum(1)
    import numpy

    return torch.tensor([numpy.count_nonzero(each) for each in masks.numpy()])


def _histogram(bins: Iterable[Tensor], size: int) -> Tensor:
    """How often each of ``size`` whole numbers occurs, per expert: [k, size]."""
    return torch.stack([torch.bincount(each.flatten(), minlength=size) for each in bins])


def _descend(wanted: Sequence[int], tally: Tensor) -> tuple[list[int], list[int], list[int]]:
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


Bins = tuple[list[int], list[int], list[int]]


def _descend_near(wanted: Sequence[int], first: list[int], tally: Tensor) -> tuple[list[int], list[int], Bins | None]:
    """As `_descend` among the high halves, and among the low ones of these bins if they were tallied too."""
    buckets, left, _ = _descend(wanted, tally[:, : kernels.HIGH])
    low = tally[:, kernels.HIGH :].view(len(tally), -1, kernels.LOW)
    places = [bucket - start for bucket, start in zip(buckets, first, strict=True)]
    if not all(0 <= place < low.shape[1] for place in places):
        return buckets, left, None
    return buckets, left, _descend(left, low[range(len(low)), places])


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
    taken = torch.zeros_like(masks[0])
    disjoint = masks.clone()
    for k in order:
        disjoint[k] &= ~taken
        taken |= masks[k]
    return disjoint


def top_of_blocks(scores: Tensor, n: int, m: int, free: Tensor, tail: int) -> Tensor:
    """The ``n`` highest free scores of every ``m`` consecutive elements of the flat slice (n:m).

    A last block that is shorter keeps ``tail``. A slice begins at a block's first element.
    """
    k, size = scores.shape[0], scores[0].numel()
    padding = -size % m
    flat = torch.nn.functional.pad(scores.flatten(1), (0, padding)).view(k, -1, m)
    open_ = torch.nn.functional.pad(free.flatten(1), (0, padding)).view(k, -1, m)
    wanted = torch.full(flat.shape[:2], n, device=scores.device)
    if padding:
        wanted[:, -1] = tail
    return top_of_rows(flat, wanted, open_).flatten(1)[:, :size].view_as(scores)


# --- draws: counter-based, so that no mask depends on what was visited before ---------------------


def uniforms(key: tuple[object, ...], start: int, size: int, *, double: bool = False) -> Tensor:
    """``size`` uniforms in [0, 1) from position ``start`` of the stream named by ``key``.

    Philox4x64-10, keyed by the first 16 bytes of the SHA-256 of the names joined by 0x1f
    (methods.md 0.7): float32 takes 24 bits of each 32-bit half, low half first, float64 takes 53.
    """
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return kernels.for_draws().uniforms(digest[:16], start, size, double=double)
