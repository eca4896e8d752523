"""An open checkpoint: its tensors' bytes, read where they lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint.formats import format_of
from merger.checkpoint.formats.interface import fill_from
from merger.checkpoint.open_files import OpenFiles
from merger.checkpoint.tensor_info import ITEM_SIZE, Info, torch_dtype
from merger.errors import UnreadableError, system_reason

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
"""The model that an output is, where it is one file."""
PACKED = "experts.safetensors"
"""Several experts, of which none can be loaded as it is."""

COMPARED = 8 << 20
"""Bytes of two tensors that are compared at a time."""


class Checkpoint:
    """An open checkpoint. Threads may read from it side by side; nothing is mapped."""

    adapter: Checkpoint | None = None  # what sits on top of it, as far as it has files and a commit
    remarks: tuple[str, ...] = ()  # what a user should know of how it was opened
    is_rearranged = False  # whether some tensors have other names or packings than in the files

    def __init__(
        self,
        label: str,
        directory: Path,
        tensors: Mapping[str, Info],
        config: Mapping[str, Any],
        *,
        commit: str | None = None,
        original_names: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.label = label  # how messages name it: base, or the expert's name
        self.directory = directory
        self.tensors = dict(tensors)
        self.config = dict(config)
        self.commit = commit  # of the Hub repository it came from
        self.original_names = original_names  # in the files, of tensors that have other names here
        self._files = OpenFiles(os.O_RDONLY)

    @property
    def files(self) -> list[Path]:
        """The weight files, in order of name."""
        return sorted({file for info in self.tensors.values() for file in info.files})

    @property
    def is_decoded(self) -> bool:
        """Whether codes are stored in place of some tensors."""
        return any(info.code is not None for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """A whole tensor in its shape, in the dtype of `read_rows`."""
        info = self.tensors[name]
        return self.read_rows(name, 0, info.matrix[0]).view(info.shape)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is read."""
        return torch_dtype(self.tensors[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor as [rows, columns], in its `dtype`."""
        rows = torch.empty(stop - start, self.tensors[name].matrix[1], dtype=self.dtype(name))
        self.read_into(rows, name, start, stop)
        return rows

    def read_into(self, rows: Tensor, name: str, start: int, stop: int) -> None:
        """Reads rows into memory that is there already, [rows, columns] in one piece and in any wider dtype."""
        self._read_stored(rows, self.tensors[name], start, stop)

    def _read_stored(self, rows: Tensor, info: Info, start: int, stop: int) -> None:
        """Reads rows of a tensor as the file's format stores them, from the places of its pieces, or from its codes."""
        if info.pieces:
            self._read_pieces(rows, info, start, stop)
            return
        if info.code is not None:
            info.code.read_into(rows, start, stop, self._stored_rows)
            return
        assert info.file is not None, "only a plan is made from headers alone"
        format_ = format_of(info.file.name)
        assert format_ is not None, "no other file is a weight file"
        format_.read_into(rows, info, start, stop, partial(self._fill, info.file))

    def _stored_rows(self, info: Info, start: int, stop: int) -> Tensor:
        """Rows of a stored tensor in its dtype, [rows, columns]."""
        rows = torch.empty(stop - start, info.matrix[1], dtype=torch_dtype(info))
        self._read_stored(rows, info, start, stop)
        return rows

    def _read_pieces(self, rows: Tensor, info: Info, start: int, stop: int) -> None:
        """Reads rows of a tensor that is made of rows of others, all of one width."""
        width = info.pieces[0].tensor.matrix[1]
        units = rows.view(-1, width)
        first, last = (row * info.matrix[1] // width for row in (start, stop))
        position = 0
        for tensor, begin, end in info.pieces:
            low, high = max(first, position), min(last, position + end - begin)
            if low < high:
                shift = begin - position
                self._read_stored(units[low - first : high - first], tensor, low + shift, high + shift)
            position += end - begin

    def equal(self, tensor: str, twin: str) -> bool | None:
        """Whether two tensors hold the same bits; None where only their headers are at hand. torch is not needed."""
        info, twin_info = self.tensors[tensor], self.tensors[twin]
        if (info.dtype, info.shape) != (twin_info.dtype, twin_info.shape):
            return False
        if info.file is None or twin_info.file is None:
            return None
        rows, columns = info.matrix
        step = max(1, COMPARED // max(1, columns * ITEM_SIZE[info.dtype]))
        spans = ((start, min(start + step, rows)) for start in range(0, rows, step))
        return info == twin_info or all(
            self._stored_bytes(info, *span) == self._stored_bytes(twin_info, *span) for span in spans
        )

    def _stored_bytes(self, info: Info, start: int, stop: int) -> bytes | bytearray:
        """Rows of a tensor as they are stored, in row order."""
        if not info.is_plain:
            rows = self._stored_rows(info, start, stop)
            return rows.view(torch.uint8).numpy().tobytes()
        assert info.file is not None, "only a plan is made from headers alone"
        width = info.matrix[1] * ITEM_SIZE[info.dtype]
        content = bytearray((stop - start) * width)
        self._fill(info.file, info.offset + start * width, memoryview(content))
        return content

    def change_rows(self, name: str, start: int, stop: int) -> Tensor | None:
        """Returns the float32 change of rows of the base, for a model that stores a change; None for other models."""

    def change_rank(self, name: str, base: Checkpoint, base_name: str) -> int | None:
        """The largest rank of the difference of a tensor from one of ``base``; None where headers do not bound it."""
        is_same = self.directory == base.directory and self.tensors[name] == base.tensors[base_name]
        return 0 if is_same else None

    def _fill(self, file: Path, position: int, buffer: memoryview) -> None:
        try:
            with self._files.use(file) as descriptor:
                fill_from(descriptor, file, position, buffer)
        except OSError as error:
            raise UnreadableError(f"{file}: cannot be read: {system_reason(error)}") from None

    def close(self) -> None:
        """Closes its files."""
        self._files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
