"""compressed-tensors' `pack-quantized`: integers of 1 to 8 bits packed into words of 32, as of AWQ and GPTQ recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint.codes.interface import Found, Grid, ScaledCodes, first_scale, schemes
from merger.checkpoint.tensor_info import Info

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.tensor_info import ReadRows

_WORD = 32
_PACKED, _COMPANIONS = "weight_packed", ("weight_scale", "weight_zero_point", "weight_shape")


def find(tensors: Mapping[str, Info], config: Mapping[str, Any]) -> Found:
    """Returns the weights that are packed into words; none where the config does not tell their number of bits."""
    weights: dict[str, Info] = {}
    used: set[str] = set()
    bits, group_size = _only_number(config, "num_bits"), _only_number(config, "group_size")
    if bits is None:
        return weights, used
    for name, info in tensors.items():
        if not name.endswith(_PACKED) or info.dtype != "I32" or len(info.shape) != 2:
            continue
        module = name.removesuffix(_PACKED)
        if f"{module}weight_g_idx" in tensors:  # columns out of the order of their groups
            continue
        scale_name = first_scale(tensors, name, [f"{module}weight_scale"])
        scale = tensors[scale_name]
        columns = info.shape[1] * _WORD // bits if group_size is None else scale.shape[-1] * group_size
        shape = (info.shape[0], columns)
        try:
            grid = Grid.of(scale, shape)
        except ValueError as error:
            raise ValueError(f"{scale_name} {error}") from None
        zero_point = tensors.get(f"{module}weight_zero_point")
        packed_grid = None if zero_point is None else _PackedGrid(zero_point, 1, grid.block_columns, bits, shape[0])
        weights[f"{module}weight"] = _Packed(info, shape, grid, packed_grid, bits).weight()
        used |= {name, *(f"{module}{part}" for part in _COMPANIONS)} & tensors.keys()
    return weights, used


def _only_number(config: Mapping[str, Any], key: str) -> int | None:
    """The one positive number that all schemes of the config give for a key; None where there is none, or several."""
    numbers = {value for scheme in schemes(config) if type(value := scheme.get(key)) is int and value > 0}
    return numbers.pop() if len(numbers) == 1 else None


@dataclass(frozen=True)
class _Packed(ScaledCodes):
    """Integers of ``bits`` bits, packed along the columns; the lowest is stored as zero."""

    bits: int = 4

    def values(self, codes: Tensor) -> Tensor:
        """The integers of rows of words."""
        return _unpacked(codes, self.bits, self.shape[1])


@dataclass(frozen=True)
class _PackedGrid(Grid):
    """Zero points that are packed along the rows: [words, columns of blocks]."""

    bits: int
    rows: int

    def numbers(self, first: int, last: int, read: ReadRows) -> Tensor:
        """The zero points of rows ``first`` to ``last``."""
        words = read(self.stored, 0, self.stored.shape[0])
        return _unpacked(words.T, self.bits, self.rows).T[first:last]


def _unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Integers [r count] of rows of 32-bit words [r w]: the bits of each follow one after another, the lowest first."""
    positions = torch.arange(count) * bits
    places, shifts = positions // _WORD, positions % _WORD
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    following = torch.cat([unsigned[:, 1:], torch.zeros_like(unsigned[:, :1])], 1)
    codes = (unsigned[:, places] | following[:, places] << _WORD) >> shifts & (1 << bits) - 1
    return (codes - (1 << bits - 1)).float()
