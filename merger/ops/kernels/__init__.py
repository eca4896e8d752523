"""The loops over weights, twice with the same results: compiled for float32 in memory, and in torch for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.kernels.lazy import Lazy
from merger.ops.kernels.library import library, stored_as
from merger.ops.kernels.native import AtOnce, Native
from merger.ops.kernels.reference import HIGH, LOW, Reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HIGH", "LOW", "AtOnce", "Native", "Reference", "compiled", "for_draws", "for_stored", "of"]

_NATIVE, _AT_ONCE, _REFERENCE = Native(), AtOnce(), Reference()


def compiled() -> bool:
    """Whether the compiled loops are there."""
    return library() is not None


def of(values: Tensor) -> Reference:
    """The loops for deltas or scores: who brings an expression gets one, and who brings a tensor a tensor."""
    if isinstance(values, Lazy):
        return _NATIVE
    plain = values.is_cpu and values.dtype == torch.float32
    return _AT_ONCE if plain and compiled() else _REFERENCE


def for_stored(stored: Tensor) -> Reference:
    """The loops for tensors as they were read; of those that are compiled, expressions come."""
    return _NATIVE if stored.is_cpu and stored_as(stored.dtype) is not None else _REFERENCE


def for_draws(beside: Tensor | None) -> Reference:
    """The loops for random numbers that go with a slice."""
    if isinstance(beside, Lazy):
        return _NATIVE
    return _AT_ONCE if compiled() else _REFERENCE
