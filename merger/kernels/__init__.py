"""The loops over weights, twice with the same results: compiled for float32 in memory, and in torch for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.kernels import native
from merger.kernels.native import Native
from merger.kernels.reference import HIGH, LOW, Reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HIGH", "LOW", "Native", "Reference", "compiled", "for_draws", "for_stored", "of"]

_NATIVE, _REFERENCE = Native(), Reference()


def compiled() -> bool:
    """Whether the compiled loops are there."""
    return native.library() is not None


def of(values: Tensor) -> Reference:
    """The loops for deltas or scores."""
    plain = values.is_cpu and values.dtype == torch.float32
    return _NATIVE if plain and compiled() else _REFERENCE


def for_stored(stored: Tensor) -> Reference:
    """The loops for tensors as they were read."""
    return _NATIVE if stored.is_cpu and compiled() and native.takes(stored.dtype) else _REFERENCE


def for_draws() -> Reference:
    """The loops for random numbers."""
    return _NATIVE if compiled() and native.has("uniforms_f32") else _REFERENCE
