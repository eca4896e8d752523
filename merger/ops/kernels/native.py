"""The loops in compiled code, with the bits of `Reference`; those that work element by element return expressions.

A result is a `Lazy`, which is computed when a tally, a row's order or the output needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.kernels.lazy import Array, Lazy, plain
from merger.ops.kernels.library import call, number, stored_as
from merger.ops.kernels.reference import HIGH, LOW, blocks_as_rows
from merger.ops.kernels.steps import OVERFLOW, Step, carry_out, constant

if TYPE_CHECKING:
    from torch import Tensor


class Native:
    """The loops over float32 in the memory of the CPU."""

    def difference(self, stored: Tensor, refuse: Callable[[], None]) -> tuple[Lazy, Lazy]:
        """As `Reference.difference`, but ``refuse`` is called on values that are not finite."""
        stored = stored.contiguous()
        base, *experts = (row.data_ptr() for row in stored)
        dtype = stored_as(stored.dtype) or 0
        deltas = [
            Step("DELTA", numbers=(expert, base), dtype=dtype, memory=stored, refuse=refuse) for expert in experts
        ]
        widened = Step("WIDEN", numbers=(base,), dtype=dtype, memory=stored)
        return Lazy([widened], stored.shape[1:]), Lazy(deltas, (len(deltas), *stored.shape[1:]))

    def restored(self, stored: Tensor, base: Array, deltas: Array, delta: Array) -> tuple[Tensor, bool]:
        """As `Reference.restored`."""
        stored = stored.contiguous()
        merged = torch.empty_like(stored[0])
        dtype = stored_as(stored.dtype) or 0
        (changed,) = Lazy.of(delta).steps
        value = Step("ROUND", *Lazy.of(base).steps, changed, dtype=dtype)
        for change, expert in zip(Lazy.of(deltas).steps, stored[1:], strict=True):
            value = Step("TAKE", changed, change, value, numbers=(expert.data_ptr(),), dtype=dtype)
        sink = Step("WRITE", value, changed, numbers=(merged.data_ptr(),), dtype=dtype)
        return merged, not carry_out([sink], merged.numel()) & OVERFLOW

    def keys_of(self, scores: Array) -> Array:
        """As `Reference.keys_of`, with the bits as floats."""
        return Lazy.of(scores.float())

    def tally_high(self, keys: Array, free: Array | None, into: Tensor) -> None:
        """As `Reference.tally_high`."""
        assert into.shape == (len(keys), HIGH)
        _count("TALLY_HIGH", keys, free, [()] * len(keys), into)

    def tally_low(self, keys: Array, free: Array | None, buckets: list[int], into: Tensor) -> None:
        """As `Reference.tally_low`."""
        assert into.shape == (len(keys), LOW)
        _count("TALLY_LOW", keys, free, [(bucket,) for bucket in buckets], into)

    def tally_near(self, keys: Array, free: Array | None, first: list[int], into: Tensor) -> None:
        """As `Reference.tally_near`."""
        assert len(into) == len(keys)
        _count("TALLY_NEAR", keys, free, [(key, into.shape[1] - 1) for key in first], into)

    def count_equal(self, keys: Array, free: Array | None, last: list[int]) -> Tensor:
        """As `Reference.count_equal`."""
        equal = torch.zeros(len(keys), dtype=torch.int64)
        _count("COUNT_EQUAL", keys, free, [(level,) for level in last], equal.view(-1, 1))
        return equal

    def mark_top(self, keys: Array, free: Array | None, last: list[int], room: list[int]) -> Array:
        """As `Reference.mark_top`."""
        rows = zip(_rows(keys, free), last, room, strict=True)
        steps = [Step("MARK", *row, numbers=(level, max(0, space))) for row, level, space in rows]
        return Lazy(steps, keys.shape, mask=True)

    def top_of_rows(self, scores: Array, counts: Tensor, free: Array) -> Tensor:
        """As `Reference.top_of_rows`."""
        mask = torch.empty(scores.shape, dtype=torch.bool)
        rows = counts.expand(scores.shape[:-1]).to(torch.int64).contiguous()
        open_ = free.expand(scores.shape).contiguous()
        if not call("top_of_rows", scores.float().contiguous(), open_, rows, rows.numel(), scores.shape[-1], mask):
            raise MemoryError
        return mask

    def top_of_blocks(self, scores: Array, n: int, m: int, free: Array | None, tail: int) -> Array:
        """As `Reference.top_of_blocks`."""
        if number("piece") % m:
            return blocks_as_rows(self.top_of_rows, plain(scores), n, m, plain(free), tail)
        steps = [Step("TOP_OF_BLOCKS", *row, numbers=(m, n, tail)) for row in _rows(scores.float(), free)]
        return Lazy(steps, scores.shape, mask=True)

    def ranks_of_rows(self, scores: Array) -> Array:
        """As `Reference.ranks_of_rows`."""
        ranks = torch.empty(scores.shape, dtype=torch.float32)
        columns = ranks.shape[-1]
        if not call("ranks_of_rows", scores.float().contiguous(), ranks.numel() // max(1, columns), columns, ranks):
            raise MemoryError
        return Lazy.of(ranks)

    def at_least(self, values: Array, limits: Array) -> Array:
        """As `Reference.at_least`."""
        return Lazy.of(values).at_least(limits)

    def keep(self, deltas: Array, mask: Array) -> Array:
        """As `Reference.keep`."""
        deltas, mask = Lazy.of(deltas), Lazy.of(mask.expand(deltas.shape) if mask.shape != deltas.shape else mask)
        pairs = zip(deltas.steps, mask.steps, strict=True)
        return Lazy([Step("AND", delta, mask_row) for delta, mask_row in pairs], deltas.shape)

    def weighted_sum(self, deltas: Array, weights: Tensor) -> Array:
        """As `Reference.weighted_sum`."""
        deltas = Lazy.of(deltas)
        return Lazy([_sum_of(deltas.steps, [constant(weight) for weight in weights.tolist()])], deltas.shape[1:])

    def anchored_sum(self, deltas: Array, weights: Tensor) -> Array:
        """As `Reference.anchored_sum`."""
        deltas = Lazy.of(deltas)
        anchor, *tail = deltas.steps
        total = anchor
        for delta, weight in zip(tail, weights[1:].tolist(), strict=True):
            total = Step("ADD_PRODUCT", total, Step("SUBTRACT", delta, anchor), constant(weight))
        return Lazy([total], deltas.shape[1:])

    def mean_of_agreeing(self, deltas: Array, elected: Array, weights: Tensor) -> Array:
        """As `Reference.mean_of_agreeing`."""
        deltas = Lazy.of(deltas)
        (sign,) = Lazy.of(elected).steps
        pairs = zip(deltas.steps, weights.tolist(), strict=True)
        agreeing = [Step("AGREE", delta, sign, constant(weight)) for delta, weight in pairs]
        total = agreeing[0]
        for weight in agreeing[1:]:
            total = Step("ADD", total, weight)
        total = Step("ONE_FOR_ZERO", total)
        # divisions are slow: one for each distinct weight
        ratios = {weight: Step("DIVIDE", constant(weight), total) for weight in weights.tolist()}
        pairs = zip(deltas.steps, weights.tolist(), strict=True)
        shares = [Step("AGREE", delta, sign, ratios[weight]) for delta, weight in pairs]
        return Lazy([_sum_of(deltas.steps, shares)], deltas.shape[1:])

    def uniforms(self, key: bytes, start: int, shape: Sequence[int], *, double: bool) -> Array:
        """As `Reference.uniforms`."""
        halves = [int.from_bytes(key[i : i + 8], "little") for i in (0, 8)]
        if not double:
            return Lazy([Step("UNIFORM", numbers=(*halves, start))], shape)
        drawn = torch.empty(*shape, dtype=torch.float64)
        call("uniforms_f64", *halves, start, drawn.numel(), drawn)
        return drawn


class AtOnce(Native):
    """The same loops for tensors: results are computed at once."""


def _at_once(loop: Callable[..., Array]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: plain(loop(*args, **kwargs))


for _name in (
    "mark_top",
    "top_of_blocks",
    "ranks_of_rows",
    "at_least",
    "keep",
    "weighted_sum",
    "anchored_sum",
    "mean_of_agreeing",
    "uniforms",
):
    setattr(AtOnce, _name, _at_once(getattr(Native, _name)))


def _sum_of(values: Sequence[Step], factors: Sequence[Step]) -> Step:
    total = Step("MULTIPLY", values[0], factors[0])
    for value, factor in zip(values[1:], factors[1:], strict=True):
        total = Step("ADD_PRODUCT", total, value, factor)
    return total


def _rows(keys: Array, free: Array | None) -> list[tuple[Step, ...]]:
    """The keys of each expert, with its free positions if there is a mask."""
    keys = Lazy.of(keys)
    if free is None:
        return [(row,) for row in keys.steps]
    masks = Lazy.of(free if free.shape == keys.shape else free.expand(keys.shape))
    return list(zip(keys.steps, masks.steps, strict=True))


def _count(name: str, keys: Array, free: Array | None, numbers: Sequence[tuple[int, ...]], into: Tensor) -> None:
    """Adds the counts of each expert to its row of ``into``."""
    experts = zip(_rows(keys, free), numbers, into, strict=True)
    sinks = [Step(name, *row, numbers=(counters.data_ptr(), *arguments)) for row, arguments, counters in experts]
    carry_out(sinks, Lazy.of(keys).size)
