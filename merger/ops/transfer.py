"""Copies between host memory and a device, through pinned memory.

A GPU reads and writes pinned memory by itself; from pageable memory every copy is made twice, and the host waits for
it. torch keeps pinned memory that is freed for the next allocation of its size, and reuses it only after the copies
from it are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Host memory for values that go to ``device`` or come from there: pinned where that is a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=torch.device(device).type == "cuda")


def buffer_bytes(nbytes: int, device: torch.device | str) -> int:
    """Bytes that a `buffer` of so many takes: torch rounds pinned allocations up to a power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes and torch.device(device).type == "cuda" else nbytes


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Values on ``device``: themselves where they are there already.

    The host does not wait for the copy, so host memory that is sent must not be changed afterwards.
    """
    if values.device == torch.device(device):
        return values
    staged = values if values.is_pinned() else buffer(values.shape, values.dtype, device).copy_(values)
    return staged.to(device, non_blocking=True)


def stack_on_device(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stacks host tensors of one shape and dtype on ``device``: [k ..]."""
    if device.type == "cpu":
        return torch.stack(list(tensors))
    stack = buffer((len(tensors), *tensors[0].shape), tensors[0].dtype, device)
    return to_device(torch.stack(list(tensors), out=stack), device)


def to_host(values: Tensor) -> Tensor:
    """Values of any device in host memory; the copy is complete."""
    return values if values.is_cpu else buffer(values.shape, values.dtype, values.device).copy_(values)
