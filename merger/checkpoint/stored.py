"""A checkpoint in a local folder: which tensors it holds, and their bytes, read where they lie."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint.header import TORCH_NAMES, Info, read_header
from merger.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE = "pytorch_model.bin"


class Checkpoint:
    """An open checkpoint of safetensors files. Threads may read from it side by side; nothing is mapped."""

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
        """A whole tensor in its stored dtype and shape."""
        info = self.tensors[name]
        return self.read_rows(name, 0, info.matrix[0]).view(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor as [rows, columns], in its stored dtype."""
        info = self.tensors[name]
        columns = info.matrix[1]
        part = torch.empty((stop - start, columns), dtype=getattr(torch, TORCH_NAMES[info.dtype]))
        width = columns * part.element_size()
        self._fill(info, info.offset + start * width, memoryview(part.view(torch.uint8).numpy()).cast("B"))
        return part

    def rows_delta(self, name: str, start: int, stop: int, base: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of a tensor as stored, on the base's device, and their float32 difference from ``base``."""
        stored = self.read_rows(name, start, stop).to(base.device)
        return stored, stored.float().sub_(base)

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
            raise CheckpointError(f"{info.file}: cannot be read: {error.strerror}") from None

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


def read_config(directory: Path, label: str) -> dict[str, Any]:
    """config.json of a checkpoint; a quantised one is refused."""
    config = read_json(directory / "config.json", label)
    refuse_quantised(config, label)
    return config


def read_json(path: Path, label: str) -> dict[str, Any]:
    """A JSON object from a checkpoint's folder."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{label}: {path.parent} has no {path.name}; is it a model's folder?") from None
    except OSError as error:
        raise CheckpointError(f"{label}: {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: {path}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{label}: {path}: expected a JSON object")
    return value


def weight_files(directory: Path, index_name: str, single: str, label: str) -> dict[str, Path] | list[Path]:
    """The files an index maps tensors to (name -> file), or the one file of an unsharded checkpoint."""
    if (directory / index_name).exists():
        weight_map = read_json(directory / index_name, label).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{label}: {directory / index_name}: has no weight_map")
        return {str(name): _inside(directory, file, label, index_name) for name, file in weight_map.items()}
    return [directory / single]


def _inside(directory: Path, file: Any, label: str, index_name: str) -> Path:
    """The shard an index names: a plain file name beside the index, never a way out of the folder."""
    if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file or "\\" in file:
        raise CheckpointError(
            f"{label}: {directory / index_name}: names {file!r}, which is not a file in its folder"
        )
    if not (directory / file).is_file():
        raise CheckpointError(
            f"{label}: {directory / index_name}: names {file}, which is missing; download it again"
        )
    return directory / file


def safetensors_tensors(directory: Path, label: str) -> dict[str, Info]:
    """All tensors of a folder's safetensors files, from their headers."""
    listed = weight_files(directory, INDEX, SINGLE, label)
    if isinstance(listed, list):
        return read_header(listed[0])
    headers = {file: read_header(file) for file in sorted(set(listed.values()))}
    for name, file in listed.items():
        if name not in headers[file]:
            raise CheckpointError(f"{label}: {file}: has no tensor {name}, which the index says it holds")
    stray = [name for header in headers.values() for name in header if name not in listed]
    if stray:
        raise CheckpointError(
            f"{label}: {directory / INDEX}: does not list {stray[0]}, which is in its files"
        )
    return {name: headers[file][name] for name, file in listed.items()}


_QUANTISED_PARTS = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".SCB",
    ".absmax",
    ".quant_map",
    ".weight_scale",
    ".weight_scale_inv",
)


def refuse_quantised(config: Mapping[str, Any], label: str) -> None:
    """A quantised checkpoint's numbers are codes, and merging codes means nothing."""
    quantisation = config.get("quantization_config")
    if quantisation:
        kind = quantisation.get("quant_method", "") if isinstance(quantisation, dict) else ""
        raise CheckpointError(_quantised(label, f"config.json names quantization_config {kind}".strip()))


def refuse_quantised_tensors(tensors: Mapping[str, Info], label: str) -> None:
    """The same, told from the tensors themselves."""
    for name, info in tensors.items():
        if info.dtype.startswith("F8"):
            raise CheckpointError(_quantised(label, f"{name} is {info.dtype}"))
        if name.endswith(_QUANTISED_PARTS):
            raise CheckpointError(_quantised(label, f"it has {name}"))


def _quantised(label: str, evidence: str) -> str:
    return (
        f"{label}: is quantised ({evidence}); merge the 16- or 32-bit checkpoint it was made from, "
        "and quantise the result"
    )
