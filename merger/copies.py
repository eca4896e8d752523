"""Copies are copies: a position that ends at an input's value has that input's bits (methods.md 0.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops import fast, positions

if TYPE_CHECKING:
    from torch import Tensor


def restored(stored: Tensor, base: Tensor, deltas: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """base + delta [r c] in ``dtype``, but the stored value itself where delta is zero or exactly one expert's.

    base + (expert - base) can differ from expert in its last bit, and -0 + 0 is +0; a copy must be
    a copy (methods.md 0.2). ``stored`` is base and experts as they were read, [1+k r c]; the rest is float32.
    """
    merged = (base + delta).to(dtype).contiguous()
    places = _in_doubt(merged, stored) if stored.dtype == dtype else slice(None)
    found, chosen = merged.view(-1)[places], delta.reshape(-1)[places]
    if len(found):
        inputs, own = stored.flatten(1)[:, places].to(dtype), deltas.flatten(1)[:, places]
        for k in range(len(own)):
            found = torch.where(chosen == own[k], inputs[1 + k], found)
        merged.view(-1)[places] = torch.where(chosen == 0, inputs[0], found)
    return merged


def _in_doubt(merged: Tensor, stored: Tensor) -> Tensor | slice:
    """Where base + (expert - base), in float32 and rounded to the 16 bits of both, may not be the expert's own bits.

    float32 has 24 significant bits. The sum is exact unless the expert's value is so much smaller than the
    base's that its last bit lies beyond those, and then so is ``merged``; and -0 may turn to +0. Bit patterns
    of floats without their sign, read as integers, grow by ``1 << mantissa`` with each power of two.
    """
    if stored.dtype not in (torch.bfloat16, torch.float16):
        return slice(None)
    mantissa = 7 if stored.dtype == torch.bfloat16 else 10
    size, from_size = (each.view(torch.int16).flatten() & 0x7FFF for each in (merged, stored[0]))
    ratio = size - from_size
    if size.amin() == 0:
        ratio[size == 0] = torch.iinfo(torch.int16).min
    least = -(21 - mantissa << mantissa)
    if ratio.amin() >= least:
        return ratio.new_empty(0, dtype=torch.int64)
    return positions(fast("gt", ratio.new_full((1,), least), ratio))
