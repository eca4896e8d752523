"""The loops in compiled code: native.c on float32 in memory, with the results of `Reference`.

The library is built when merger is installed where there is a C compiler; ctypes lets go of Python's lock in a call.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.kernels.reference import HIGH, LOW, Reference

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIX = {"torch.bfloat16": "bf16", "torch.float16": "f16", "torch.float32": "f32"}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where they were not built."""
    found = find_spec("merger.kernels._native")
    if found is None or found.origin is None:
        return None
    try:
        return ctypes.CDLL(found.origin)
    except OSError:  # built for another machine
        return None


@cache
def has(name: str) -> bool:
    """Whether a loop was built: not every compiler knows half floats and products of 128 bits."""
    return hasattr(library(), name)


@cache
def takes(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype can be read and written here."""
    return str(dtype) in _SUFFIX and has(f"difference_{_SUFFIX[str(dtype)]}")


@cache
def _loop(name: str, count: int) -> Any:
    loop = getattr(library(), name)
    loop.restype = ctypes.c_int64
    loop.argtypes = [ctypes.c_int64] * count  # an address is a whole number too
    return loop


def _call(name: str, *arguments: Tensor | int | None) -> int:
    """Calls a loop with tensors in one piece, whole numbers, and None for an array that is not there."""
    told = [each if isinstance(each, int) else 0 if each is None else each.data_ptr() for each in arguments]
    answer: int = _loop(name, len(told))(*told)
    return answer


class Native(Reference):
    """The loops over float32 in the memory of the CPU."""

    def difference(self, stored: Tensor) -> tuple[Tensor, Tensor, bool]:
        """As `Reference.difference`."""
        stored = stored.contiguous()
        values = torch.empty(stored.shape, dtype=torch.float32)
        base, deltas = values[0], values[1:]
        finite = _call(f"difference_{_SUFFIX[str(stored.dtype)]}", stored, deltas.shape[0], base.numel(), base, deltas)
        return base, deltas, bool(finite)

    def restored(self, stored: Tensor, base: Tensor, deltas: Tensor, delta: Tensor) -> tuple[Tensor, bool]:
        """As `Reference.restored`."""
        arrays = [each.contiguous() for each in (stored, base, deltas, delta)]
        merged = torch.empty_like(arrays[0][0])
        finite = _call(f"restored_{_SUFFIX[str(stored.dtype)]}", *arrays, deltas.shape[0], merged.numel(), merged)
        return merged, bool(finite)

    def tally_high(self, keys: Tensor, free: Tensor | None, first: list[int], into: Tensor) -> None:
        """As `Reference.tally_high`."""
        near = into.shape[1] // LOW
        assert into.shape == (len(keys), HIGH + near * LOW)
        _call("tally_high", keys, _like(free, keys), torch.tensor(first), near, *_extent(keys), into)

    def tally_low(self, keys: Tensor, free: Tensor | None, buckets: list[int], into: Tensor) -> None:
        """As `Reference.tally_low`."""
        assert into.shape == (keys.shape[0], LOW)
        _call("tally_low", keys, _like(free, keys), torch.tensor(buckets), *_extent(keys), into)

    def count_equal(self, keys: Tensor, free: Tensor | None, last: list[int]) -> Tensor:
        """As `Reference.count_equal`."""
        equal = torch.empty(keys.shape[0], dtype=torch.int64)
        _call("count_equal", keys, _like(free, keys), torch.tensor(last), *_extent(keys), equal)
        return equal

    def mark_top(self, keys: Tensor, free: Tensor | None, last: list[int], room: list[int]) -> Tensor:
        """As `Reference.mark_top`."""
        kept = torch.empty_like(keys, dtype=torch.bool)
        _call("mark_top", keys, _like(free, keys), torch.tensor(last), torch.tensor(room), *_extent(keys), kept)
        return kept

    def top_of_rows(self, scores: Tensor, wanted: Tensor, free: Tensor) -> Tensor:
        """As `Reference.top_of_rows`."""
        kept = torch.empty(scores.shape, dtype=torch.bool)
        rows = wanted.expand(scores.shape[:-1]).to(torch.int64).contiguous()
        open_ = free.expand_as(scores).contiguous()
        if not _call("top_of_rows", self.keys_of(scores), open_, rows, rows.numel(), scores.shape[-1], kept):
            raise MemoryError
        return kept

    def ranks_of_rows(self, scores: Tensor) -> Tensor:
        """As `Reference.ranks_of_rows`."""
        ranks = torch.empty(scores.shape, dtype=torch.int32)
        if not _call("ranks_of_rows", self.keys_of(scores), scores[..., 0].numel(), scores.shape[-1], ranks):
            raise MemoryError
        return ranks

    def keep(self, deltas: Tensor, kept: Tensor) -> Tensor:
        """As `Reference.keep`."""
        deltas, kept = deltas.contiguous(), kept.expand_as(deltas).contiguous()
        thinned = torch.empty_like(deltas)
        _call("keep", deltas, kept, deltas.numel(), thinned)
        return thinned

    def weighted_sum(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """As `Reference.weighted_sum`."""
        return _over_experts("weighted_sum", deltas, weights)

    def anchored_sum(self, deltas: Tensor, weights: Tensor) -> Tensor:
        """As `Reference.anchored_sum`."""
        return _over_experts("anchored_sum", deltas, weights)

    def mean_of_agreeing(self, deltas: Tensor, elected: Tensor, weights: Tensor) -> Tensor:
        """As `Reference.mean_of_agreeing`."""
        return _over_experts("mean_of_agreeing", deltas, elected.contiguous(), weights)

    def uniforms(self, key: bytes, start: int, size: int, *, double: bool) -> Tensor:
        """As `Reference.uniforms`."""
        drawn = torch.empty(size, dtype=torch.float64 if double else torch.float32)
        halves = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8))
        _call("uniforms_f64" if double else "uniforms_f32", *halves, start, size, drawn)
        return drawn


def _over_experts(name: str, deltas: Tensor, *others: Tensor) -> Tensor:
    deltas = deltas.contiguous()
    merged = torch.empty_like(deltas[0])
    _call(name, deltas, *(each.contiguous() for each in others), *_extent(deltas), merged)
    return merged


def _extent(stack: Tensor) -> tuple[int, int]:
    """How many experts, and how many elements of each."""
    experts = stack.shape[0]
    return experts, stack.numel() // experts


def _like(mask: Tensor | None, stack: Tensor) -> Tensor | None:
    """A mask that may be one for all experts, in one piece and as large as the stack."""
    return None if mask is None else mask.expand_as(stack).contiguous()
