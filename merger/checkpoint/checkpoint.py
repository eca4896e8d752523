"""An open checkpoint: its tensors' bytes, read where they lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint.safetensors_header import ITEM_SIZE, TORCH_NAMES, Info
from merger.errors import CheckpointError, UnreadableError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED = "experts.safetensors"
"""Several experts, of which none can be loaded as it is."""

COMPARED = 8 << 20
"""Bytes of two tensors that are compared at a time."""


class Checkpoint:
    """An open checkpoint. Threads may read from it side by side; nothing is mapped."""

    adapter: Checkpoint | None = None  # what sits on top of it, as far as it has files and a commit
    remarks: tuple[str, ...] = ()  # what a user should know of how it was opened

    def __init__(
        self,
        label: str,
        directory: Path,
        tensors: Mapping[str, Info],
        config: Mapping[str, Any],
        *,
        commit: str | None = None,
    ) -> None:
        self.label = label  # how messages name it: base, or the expert's name
        self.directory = directory
        self.tensors = dict(tensors)
        self.config = dict(config)
        self.commit = commit  # of the Hub repository it came from
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()

    @property
    def files(self) -> list[Path]:
        """The weight files, in order of name."""
        return sorted({info.file for info in self.tensors.values() if info.file is not None})

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
        info = self.tensors[name]
        if info.strides is None and rows.dtype == torch_dtype(info):
            skipped = start * info.matrix[1] * rows.element_size()
            self._fill(info, info.offset + skipped, rows.flatten().view(torch.uint8).numpy().data)
        else:
            rows.copy_(self._read(info, start, stop))

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
        if info.strides is not None:
            return self._read(info, start, stop).view(torch.uint8).numpy().tobytes()
        width = info.matrix[1] * ITEM_SIZE[info.dtype]
        content = bytearray((stop - start) * width)
        self._fill(info, info.offset + start * width, memoryview(content))
        return content

    def change_rows(self, name: str, start: int, stop: int) -> Tensor | None:
        """What is added to rows of the base, in float32, where that is how the model is made; else None."""

    def _read(self, info: Info, start: int, stop: int) -> Tensor:
        rows, columns = info.matrix
        if info.strides is None:
            skipped = start * columns * torch_dtype(info).itemsize
            return self._numbers(info, skipped, (stop - start) * columns).view(stop - start, columns)
        # Its rows lie scattered over the file. Such tensors are rare, and are read whole for each slice of them.
        extent = 1 + sum((n - 1) * step for n, step in zip(info.shape, info.strides, strict=True))
        whole = self._numbers(info, 0, extent).as_strided(info.shape, info.strides)
        return whole.reshape(rows, columns)[start:stop].clone()

    def _numbers(self, info: Info, skipped: int, count: int) -> Tensor:
        """``count`` numbers from ``skipped`` bytes behind the tensor's first one on."""
        part = torch.empty(count, dtype=torch_dtype(info))
        self._fill(info, info.offset + skipped, part.view(torch.uint8).numpy().data)
        return part

    def _fill(self, info: Info, position: int, buffer: memoryview) -> None:
        assert info.file is not None, "only a plan is made from headers alone"
        try:
            descriptor = self._open(info.file)
            while buffer:
                count = os.preadv(descriptor, [buffer], position)
                if count == 0:
                    raise CheckpointError(f"{info.file}: ended at byte {position:,} while it was being read")
                buffer, position = buffer[count:], position + count
        except OSError as error:
            raise UnreadableError(f"{info.file}: cannot be read: {error.strerror}") from None

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]

    def close(self) -> None:
        """Closes its files."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def torch_dtype(info: Info) -> torch.dtype:
    """What torch calls the dtype of a stored tensor."""
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
    return dtype
