"""A safetensors file whose tensors are appended as they are made, with shapes that nobody knows beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from merger.checkpoint.disk import disk_error
from merger.checkpoint.formats.safetensors import encode_header
from merger.checkpoint.tensor_info import SAFETENSORS_NAMES, Info

if TYPE_CHECKING:
    from torch import Tensor


class GrowingFile:
    """Tensors one after another; the header, which stands before them and is known last, has ``room`` bytes."""

    def __init__(self, path: Path, room: int, metadata: Mapping[str, str] = MappingProxyType({})) -> None:
        self.path, self._metadata = path, metadata
        self.tensors: dict[str, Info] = {}
        self._room = room
        self._end = 8 + room
        try:
            self._file = path.open("xb")
        except OSError as error:
            raise disk_error(path, error) from None

    def append(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor; ResourceError if the disk fails."""
        dtype = SAFETENSORS_NAMES[str(tensor.dtype).removeprefix("torch.")]
        self.tensors[name] = Info(dtype, tuple(tensor.shape))
        self._write(self._end, tensor.contiguous().numpy().tobytes())
        self._end += tensor.nbytes

    def finish(self) -> None:
        """Writes the header; ResourceError if the disk fails."""
        header, _ = encode_header(self.tensors, self._room, self._metadata)
        self._write(0, header)

    def close(self) -> None:
        """Closes the file, which is no checkpoint before `finish`."""
        self._file.close()

    def _write(self, position: int, content: bytes) -> None:
        try:
            self._file.seek(position)
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise disk_error(self.path, error) from None
