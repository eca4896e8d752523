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


def arithmetic_copies(base: Tensor, deltas: Tensor, stored: Tensor, experts: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether base + delta gives every expert's own bits back, and base + 0 the base's.

    In 16 bits it does unless an expert's value is more than 2^15 (bf16) or 2^12 (fp16) times smaller
    than the base's (methods.md 0.2), which exponents tell; otherwise every sum is looked at.
    """
    if any(_has_negative_zero(each) for each in (stored, *experts)):
        return False
    return all(
        _is_near(stored, expert, dtype) or not ((base + delta).sub_(expert.float())).abs_().amax()
        for delta, expert in zip(deltas, experts, strict=True)
    )


def _has_negative_zero(values: Tensor) -> bool:
    """-0 is the lowest of all bit patterns, read as integers."""
    bits = values.view(_integers(values))
    return bool(bits.amin() == torch.iinfo(bits.dtype).min)


def _is_near(base: Tensor, expert: Tensor, dtype: torch.dtype) -> bool:
    """Whether no exponent of a 16-bit base exceeds the expert's by what a float32 sum would lose for ``dtype``."""
    gaps = {torch.bfloat16: 15 << 7, torch.float16: 12 << 10}
    if not base.dtype == expert.dtype == dtype or dtype not in gaps:
        return False
    magnitude = torch.iinfo(torch.int16).max
    gap = (base.view(torch.int16) & magnitude).sub_(expert.view(torch.int16) & magnitude)
    return bool(gap.amax() < gaps[base.dtype])


def _integers(values: Tensor) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
