"""Between the memory of the CPU and a device's: what is read and written passes through pinned memory.

A GPU reaches pinned memory by itself, and without it every copy is made twice. torch keeps pinned memory that is let go
for the next of its size, and not before the copies from it are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def buffer(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """Memory of the CPU for what is to go to ``device``, or comes from there."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.startswith("cuda"))


def sent(values: Tensor, device: str) -> Tensor:
    """A `buffer` on its device; whoever reads it there waits for it, nobody here does."""
    return values.to(device, non_blocking=True)


def fetched(values: Tensor) -> Tensor:
    """Values of any device in the memory of the CPU, all of them there."""
    return values if values.is_cpu else buffer(values.shape, values.dtype, str(values.device)).copy_(values)
