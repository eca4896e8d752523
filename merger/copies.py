"""Copies are copies: a position that ends at an input's value has that input's bits (methods.md 0.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def restored(
    base: Tensor, experts: Iterable[Tensor], base32: Tensor, deltas: Tensor, delta: Tensor, dtype: torch.dtype
) -> Tensor:
    """base + delta in ``dtype``, but the stored value itself where delta is zero or exactly one expert's.

    base + (expert - base) can differ from expert in its last bit, and -0 + 0 is +0; a copy must be
    a copy (methods.md 0.2). ``base`` and ``experts`` are as stored, the rest float32.
    """
    merged = (base32 + delta).to(dtype)
    for expert, own in zip(experts, deltas, strict=True):
        merged = torch.where(delta == own, expert.to(dtype), merged)
    return torch.where(delta == 0, base.to(dtype), merged)


def arithmetic_copies(base: Tensor, deltas: Tensor, stored: Tensor, experts: list[Tensor]) -> bool:
    """Whether base + delta gives every expert's own bits back, and base + 0 the base's.

    In 16 bits it nearly always does: it fails where an expert's value is 2^15 times smaller than the
    base's, and for -0. (A comparison that makes booleans would take three times as long.)
    """
    if any(_has_negative_zero(each) for each in (stored, *experts)):
        return False
    error = torch.empty_like(base)
    for delta, expert in zip(deltas, experts, strict=True):
        torch.add(base, delta, out=error)
        if error.sub_(expert.float()).abs_().amax() != 0:
            return False
    return True


def _has_negative_zero(values: Tensor) -> bool:
    """-0 is the lowest of all bit patterns, read as integers."""
    bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    return bool(bits.amin() == torch.iinfo(bits.dtype).min)
