"""The arithmetic that forms of codes share: numbers times scales, of which each is for a block of the weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint.tensor_info import Code, Info

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.tensor_info import ReadRows

DECODED = 1 << 20
"""Numbers that are decoded at a time: 4 MiB of float32, and as much again of scales."""

Found = tuple[dict[str, Info], set[str]]
"""Weights by name, and the names of the stored tensors that they are made of."""


@dataclass(frozen=True)
class Grid:
    """Numbers for blocks of a weight [.., rows, columns], such as scales; the last blocks may be cut."""

    stored: Info  # [.., rows of blocks, columns of blocks]
    block_rows: int
    block_columns: int

    @classmethod
    def of(cls, stored: Info, shape: tuple[int, ...], block: tuple[int, int] | None = None) -> Grid:
        """The grid of a weight of this shape, in blocks of the size ``block``, or else in equal ones.

        ValueError if there are too many or too few numbers.
        """
        rows, columns = shape[-2:]
        grid = stored.shape if len(stored.shape) > 1 else (stored.elements, 1)  # of the weight, or of its rows
        counts = grid[-2:]
        if stored.elements == 1:
            return _One(stored, rows, columns)
        has_all = grid[:-2] == shape[:-2]
        if block is not None and counts == (-(-rows // block[0]), -(-columns // block[1])) and has_all:
            return cls(stored._replace(shape=grid), *block)
        if not has_all or not all(counts) or rows % counts[0] or columns % counts[1]:
            raise ValueError(f"is {list(stored.shape)}, which does not fit a weight of {list(shape)}")
        return cls(stored._replace(shape=grid), rows // counts[0], columns // counts[1])

    def read(self, start: int, stop: int, shape: tuple[int, ...], read: ReadRows) -> Tensor:
        """The float32 numbers for rows ``start`` to ``stop`` of the weight: [r c], or [r 1] where a row has one."""
        rows, columns = shape[-2:]
        numbers = torch.arange(start, stop)
        places = numbers // rows * self.stored.shape[-2] + numbers % rows // self.block_rows
        first, last = int(places[0]), int(places[-1])
        values = self.numbers(first, last + 1, read)[places - first]
        return values if values.shape[1] == 1 else values.repeat_interleave(self.block_columns, 1)[:, :columns]

    def numbers(self, first: int, last: int, read: ReadRows) -> Tensor:
        """The float32 numbers in rows ``first`` to ``last`` of the grid."""
        return as_float32(read(self.stored, first, last))

    @property
    def parts(self) -> tuple[Info, ...]:
        """The stored tensors that it is read from."""
        return (self.stored,)


class _One(Grid):
    """One number for all of a weight."""

    def read(self, start: int, stop: int, shape: tuple[int, ...], read: ReadRows) -> Tensor:
        """The number, for any rows."""
        return self.numbers(0, 1, read)


@dataclass(frozen=True)
class ScaledCodes(Code):
    """Codes that stand for numbers, each times the scale of its block; the zero point is subtracted before."""

    codes: Info
    shape: tuple[int, ...]  # of the weight [.., rows, columns]
    scale: Grid
    zero_point: Grid | None = None

    @property
    def parts(self) -> tuple[Info, ...]:
        """The stored tensors that the weight is made of."""
        return (self.codes, *self.scale.parts, *(() if self.zero_point is None else self.zero_point.parts))

    def read_into(self, rows: Tensor, start: int, stop: int, read: ReadRows) -> None:
        """Reads rows ``start`` to ``stop`` of the weight, of which few are decoded at a time to save memory."""
        step = max(1, DECODED // max(1, self.shape[-1]))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = self.values(read(self.codes, first, last))
            if self.zero_point is not None:
                values -= self.zero_point.read(first, last, self.shape, read)
            values *= self.scale.read(first, last, self.shape, read)
            rows[first - start : last - start] = values

    def values(self, codes: Tensor) -> Tensor:
        """The float32 numbers that rows of codes stand for: [r c]."""
        return codes.float()

    def weight(self) -> Info:
        """The weight as a tensor of the checkpoint, with the place of the codes."""
        return Info("F32", self.shape, self.codes.file, self.codes.offset, code=self)


def as_float32(values: Tensor) -> Tensor:
    """Scales in float32; a byte is a power of two, as in the microscaling formats of the Open Compute Project."""
    if values.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(values, dtype=torch.float32), values.to(torch.int32) - 127)
    return values.float()


def schemes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The sections of quantization_config that describe weights: itself, and those of compressed-tensors' groups."""
    section = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(section, Mapping):
        return
    yield section
    groups = section.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights


def first_scale(tensors: Mapping[str, Info], codes: str, candidates: list[str]) -> str:
    """The scale of some codes; ValueError if there is none."""
    for name in candidates:
        if name in tensors:
            return name
    raise ValueError(
        f"{codes} is {tensors[codes].dtype} and has no scale ({' or '.join(candidates[:2])}); download every shard of "
        "the model again"
    )
