"""Copies are copies: a position that ends at an input's value has that input's bits (docs/methods/README.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.ops import kernels

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def restored(stored: Tensor, base: Tensor, deltas: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """base + delta [r c] in ``dtype``, but the stored value itself where delta is zero or exactly one expert's.

    base + (expert - base) can differ from expert in its last bit, and -0 + 0 is +0; a copy must be
    a copy (docs/methods/README.md). ``stored`` is base and experts as they were read, [1+k r c]; the rest is float32.
    Raises OverflowError where the result is not finite.
    """
    stored = stored.to(dtype)
    merged, finite = kernels.for_stored(stored).restored(stored, base, deltas, delta)
    if not finite:
        raise OverflowError(f"the merged values overflow {dtype}")
    return merged
