"""4-bit floats (E2M1), two in a byte, the first in the low half: of gpt-oss, and of compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint.codes.interface import DECODED, Found, Grid, ScaledCodes, as_float32, first_scale
from merger.checkpoint.tensor_info import Code, Info

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.tensor_info import ReadRows

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCK = 32
"""Numbers that share a scale in gpt-oss."""


def find(tensors: Mapping[str, Info], config: Mapping[str, Any]) -> Found:
    """Returns the weights that are stored in 4-bit floats; ValueError for codes without their scale."""
    weights: dict[str, Info] = {}
    used: set[str] = set()
    for name, info in tensors.items():
        if info.dtype != "U8":
            continue
        if name.endswith("_blocks") and len(info.shape) == 4 and info.shape[3] == _BLOCK // 2:
            stem = name.removesuffix("_blocks")
            scale_name = first_scale(tensors, name, [f"{stem}_scales"])
            if tensors[scale_name].shape != info.shape[:3]:
                raise ValueError(f"{scale_name} is {list(tensors[scale_name].shape)}, expected {list(info.shape[:3])}")
            weights[stem] = _Transposed(info, tensors[scale_name]).weight()
            used |= {name, scale_name}
        elif name.endswith("weight_packed") and len(info.shape) == 2:
            module = name.removesuffix("weight_packed")
            scale_name = first_scale(tensors, name, [f"{module}weight_scale"])
            shape = (info.shape[0], 2 * info.shape[1])
            grid = Grid.of(tensors[scale_name], shape)
            divisor = tensors.get(f"{module}weight_global_scale")
            if divisor is not None:
                grid = _DividedGrid(grid.stored, grid.block_rows, grid.block_columns, divisor)
            weights[f"{module}weight"] = _Pairs(info, shape, grid).weight()
            used |= {name, scale_name, f"{module}weight_global_scale"} & tensors.keys()
    return weights, used


class _Pairs(ScaledCodes):
    """compressed-tensors' MXFP4 and NVFP4: [rows, columns / 2] bytes."""

    def values(self, codes: Tensor) -> Tensor:
        """The numbers of rows of bytes."""
        return _numbers(codes)


@dataclass(frozen=True)
class _DividedGrid(Grid):
    """Scales that are stored times one number for the matrix, so that they fit into 8 bits, as of NVFP4."""

    divisor: Info

    @property
    def parts(self) -> tuple[Info, ...]:
        """The stored tensors that it is read from."""
        return (self.stored, self.divisor)

    def numbers(self, first: int, last: int, read: ReadRows) -> Tensor:
        """The scales in rows ``first`` to ``last`` of the grid."""
        return super().numbers(first, last, read) / read(self.divisor, 0, 1).float()


@dataclass(frozen=True)
class _Transposed(Code):
    """Experts of gpt-oss: codes [E, out, in / 32, 16] and scales [E, out, in / 32] of a weight [E, in, out]."""

    codes: Info
    scale: Info

    @property
    def parts(self) -> tuple[Info, ...]:
        """The stored tensors that the weight is made of."""
        return self.codes, self.scale

    def weight(self) -> Info:
        """The weight as a tensor of the checkpoint, with the place of the codes."""
        experts, rows, blocks, _ = self.codes.shape
        return Info("F32", (experts, blocks * _BLOCK, rows), self.codes.file, self.codes.offset, code=self)

    def read_into(self, rows: Tensor, start: int, stop: int, read: ReadRows) -> None:
        """Reads rows of the weight, which are columns of the codes: one expert's codes are read at a time."""
        height = self.codes.shape[2] * _BLOCK  # rows of an expert's matrix
        while start < stop:
            expert, first = divmod(start, height)
            count = min(stop - start, height - first)
            self._read_columns(rows[:count].T, expert, first, read)
            rows, start = rows[count:], start + count

    def _read_columns(self, columns: Tensor, expert: int, first: int, read: ReadRows) -> None:
        """Reads columns of an expert's codes from ``first`` on into ``columns`` [out, c], few blocks at a time."""
        height, blocks = self.codes.shape[1:3]
        codes, scales = (
            read(info._replace(shape=(prod(info.shape[:2]), width)), expert * height, (expert + 1) * height)
            for info, width in ((self.codes, blocks * _BLOCK // 2), (self.scale, blocks))
        )
        last = first + columns.shape[1]
        step = max(1, DECODED // (height * _BLOCK))
        for block in range(first // _BLOCK, -(-last // _BLOCK), step):
            end = min(block + step, blocks)
            numbers = _numbers(codes[:, block * _BLOCK // 2 : end * _BLOCK // 2]).view(height, end - block, _BLOCK)
            numbers *= as_float32(scales[:, block:end]).unsqueeze(2)
            begin, finish = max(first, block * _BLOCK), min(last, end * _BLOCK)
            shift = block * _BLOCK
            columns[:, begin - first : finish - first] = numbers.flatten(1)[:, begin - shift : finish - shift]


def _numbers(codes: Tensor) -> Tensor:
    """The float32 numbers of rows of bytes: [r b] to [r 2b]."""
    table = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)])
    halves = torch.stack([codes & 0xF, codes >> 4], -1).flatten(1)
    return table[halves.to(torch.int32)]
