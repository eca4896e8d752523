"""The interface of a checkpoint format: file names, headers, reading rows and checking values.

A format is one module of this package with an instance of `Format` named ``FORMAT``; nothing else names it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from merger._lazy import torch
from merger.checkpoint.disk import read_at
from merger.checkpoint.tensor_info import Info, torch_dtype
from merger.errors import CheckpointError, system_reason

if TYPE_CHECKING:
    from torch import Tensor

Fill = Callable[[int, memoryview], None]
"""Fills a buffer with a file's bytes from a position on."""


@dataclass(frozen=True)
class Scan:
    """The result of one pass over a file's values."""

    sha256: str | None  # of the file; None where the pass does not see all of its bytes
    not_finite: Mapping[str, int]  # tensors that hold NaN or infinity, and how many values of it


class Format(ABC):
    """A file format of checkpoints."""

    order: int
    """Where a folder holds a model in several formats, that of the lowest order is read, as transformers does."""
    suffix: str
    """How its files are named at the end."""
    model: str
    """The file of a model in one file; the index of several is called ``MODEL.index.json``."""
    adapter: str
    """The file of a PEFT adapter."""

    @abstractmethod
    def parse(self, file: IO[bytes], size: int, path: Path, *, with_offsets: bool = True) -> dict[str, Info]:
        """Reads and checks the header of an open file of ``size`` bytes: all its tensors by name.

        ``path`` names the file in messages. Without ``with_offsets`` only dtypes and shapes are needed, of a file that
        is not on this machine. Raises CheckpointError.
        """

    @abstractmethod
    def scan(self, path: Path, header: Mapping[str, Info], tell: Callable[[int], None]) -> Scan:
        """Checks all values of a file; ``tell`` receives the number of bytes of each step. Raises CheckpointError."""

    def read_into(self, rows: Tensor, info: Info, start: int, stop: int, fill: Fill) -> None:
        """Reads rows ``start`` to ``stop`` of a tensor into ``rows``, [rows, columns] in one piece, of any wider dtype.

        Here a tensor's numbers lie one after another as they are, and so are read straight into memory of their dtype.
        """
        skipped = start * info.matrix[1] * torch_dtype(info).itemsize
        if rows.dtype == torch_dtype(info):
            fill(info.offset + skipped, rows.flatten().view(torch.uint8).numpy().data)
        else:
            rows.copy_(read_numbers(info, skipped, rows.numel(), fill).view(rows.shape))

    def header(self, path: Path) -> dict[str, Info]:
        """All tensors of a file by name; CheckpointError names the file and its fault."""
        try:
            with path.open("rb") as file:
                return self.parse(file, path.stat().st_size, path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {system_reason(error)}") from None


def read_numbers(info: Info, skipped: int, count: int, fill: Fill) -> Tensor:
    """``count`` numbers of a tensor's dtype from ``skipped`` bytes behind its first one on."""
    numbers = torch.empty(count, dtype=torch_dtype(info))
    fill(info.offset + skipped, numbers.view(torch.uint8).numpy().data)
    return numbers


def fill_from(descriptor: int, path: Path, position: int, buffer: memoryview) -> None:
    """Fills a buffer with the bytes of an open file; CheckpointError where the file ends before."""
    while buffer:
        count = read_at(descriptor, buffer, position)
        if count == 0:
            raise CheckpointError(f"{path}: ended at byte {position:,} while it was being read")
        buffer, position = buffer[count:], position + count


def count_not_finite(values: Tensor) -> int:
    """How many values are NaN or infinity."""
    return int((~torch.isfinite(values)).sum())
