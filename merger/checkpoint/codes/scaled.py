"""8-bit floats and integers, each matrix with a scale for all of it, for each row, or for each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from merger.checkpoint.codes.interface import Found, Grid, ScaledCodes, first_scale, schemes
from merger.checkpoint.tensor_info import Info

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.tensor_info import ReadRows

_BLOCK_KEYS = ("weight_block_size", "block_structure")  # of FP8 in transformers, and of compressed-tensors


def find(tensors: Mapping[str, Info], config: Mapping[str, Any]) -> Found:
    """Returns the weights that are stored in 8 bits with scales; ValueError for a float8 matrix without a scale."""
    weights: dict[str, Info] = {}
    used: set[str] = set()
    block = _block_size(config)
    for name, info in tensors.items():
        names = [name]
        if info.dtype.startswith("F8") and len(info.shape) > 1 and not name.endswith(("scale", "scale_inv")):
            names.append(first_scale(tensors, name, _scale_names(name)))
        elif info.dtype == "I8" and len(info.shape) == 2:
            names += [scale for scale in (f"{name}_scale", f"{name.removesuffix('weight')}SCB") if scale in tensors][:1]
        if len(names) == 1:
            continue
        kind = _RowMaxima if names[1].endswith("SCB") else ScaledCodes
        zero_point = f"{name}_zero_point"
        names += [zero_point] if zero_point in tensors else []
        try:
            grids = [Grid.of(tensors[grid], info.shape, block) for grid in names[1:]]
        except ValueError as error:
            raise ValueError(f"{names[1]} {error}") from None
        weights[name] = kind(info, info.shape, *grids).weight()
        used.update(names)
    return weights, used


class _RowMaxima(ScaledCodes):
    """bitsandbytes' LLM.int8(): the scale of a row is its largest magnitude, which 127 stands for."""

    def read_into(self, rows: Tensor, start: int, stop: int, read: ReadRows) -> None:
        """Reads rows in the order of `bitsandbytes.functional.int8_vectorwise_dequant`: times the scale, over 127."""
        super().read_into(rows, start, stop, read)
        rows *= 7.874015718698502e-3


def _scale_names(name: str) -> list[str]:
    """The names that the scale of an 8-bit weight may have, the most frequent first."""
    module = name.removesuffix("weight")
    return [f"{name}_scale_inv", f"{name}_scale", f"{module}scale", f"{module}qscale_weight"]


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The rows and columns of a block that the config names; None where it names none."""
    sizes: list[Any] = [scheme.get(key) for scheme in schemes(config) for key in _BLOCK_KEYS]
    return next(((rows, columns) for rows, columns in filter(_is_block, sizes)), None)


def _is_block(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(type(count) is int and count > 0 for count in size)
