"""The change of a matrix as the two factors of a LoRA adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from merger._lazy import torch
from merger.ops.linalg import Factors

if TYPE_CHECKING:
    from torch import Tensor


class FactorPair(NamedTuple):
    """lora_A and lora_B, whose product stands for the change of a matrix [out in]."""

    down: Tensor  # lora_A [rank in]
    up: Tensor  # lora_B [out rank]
    change: float  # the squared norm of the change
    error: float  # the squared norm of the part of the change that the product lacks


def factor_pair(change: Tensor, factors: Factors, *, min_rank: int = 1, dtype: torch.dtype | None = None) -> FactorPair:
    """Splits ``factors`` of a change [out in] into lora_A and lora_B, float32 or rounded to ``dtype``.

    Each gets the square root of the singular values. Rows of zeros fill the pair up to ``min_rank``, or to the full
    rank of the matrix where that is less.
    """
    root = factors.values.sqrt()
    down, up = (factors.right * root).T.float().contiguous(), (factors.left * root).float().contiguous()
    missing = min(min_rank, *change.shape) - len(root)
    if missing > 0:  # the matrix changed in fewer directions, or not at all
        down, up = torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
    if dtype is not None:
        down, up = down.to(dtype), up.to(dtype)
    return FactorPair(down, up, squared_norm(change), squared_norm(change - up.float() @ down.float()))


def squared_norm(values: Tensor) -> float:
    """The sum of the squares of all values, in float64."""
    return float(values.double().square().sum())
