"""The loops over weights in two versions with the same bits: compiled ones for the CPU, and torch for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from merger._lazy import torch
from merger.ops.kernels.interface import Loops
from merger.ops.kernels.lazy import Array, Lazy
from merger.ops.kernels.library import library, stored_as
from merger.ops.kernels.native import AtOnce, Native
from merger.ops.kernels.reference import HIGH, LOW, Reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HIGH", "LOW", "AtOnce", "Native", "Reference", "compiled", "for_draws", "for_stored", "of"]

_REFERENCE: Loops[Tensor] = Reference()
_EXPRESSIONS: Loops[Array] = Native()
# What calls the loops need not know of expressions: a `Lazy` has the interface of a tensor.
_NATIVE, _AT_ONCE = cast("Loops[Tensor]", _EXPRESSIONS), cast("Loops[Tensor]", AtOnce())


def compiled() -> bool:
    """Whether the compiled loops were built."""
    return library() is not None


def of(values: Tensor) -> Loops[Tensor]:
    """The loops for deltas or scores: those on expressions return expressions, those on tensors return tensors."""
    if isinstance(values, Lazy):
        return _NATIVE
    is_float32_on_cpu = values.is_cpu and values.dtype == torch.float32
    return _AT_ONCE if is_float32_on_cpu and compiled() else _REFERENCE


def for_stored(stored: Tensor) -> Loops[Tensor]:
    """The loops for stored values; the compiled ones return expressions."""
    return _NATIVE if stored.is_cpu and stored_as(stored.dtype) is not None else _REFERENCE


def for_draws(slice_values: Tensor | None) -> Loops[Tensor]:
    """The loops for random numbers beside the values of a slice."""
    if isinstance(slice_values, Lazy):
        return _NATIVE
    return _AT_ONCE if compiled() else _REFERENCE
