"""Statistics files: what was found of one expert's inputs, kept for the next run and for other machines."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.calibration.moments import Moments
from merger.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.settings import Settings

FORMAT = 1
_FIELDS = ("count", "second_moment", "mean", "token_share")  # Gram matrices are too large to keep
_METADATA = "merger.statistics"  # a single entry, since safetensors writes several in any order


@dataclass(frozen=True)
class Key:
    """All that decides what a statistics file holds."""

    checkpoint: str  # a fingerprint of the expert's weights
    data: str
    tokenizer: str
    settings: Settings
    format: int = FORMAT

    def fields(self) -> dict[str, Any]:
        """Its parts by name, those of the settings included."""
        return {
            "format": self.format,
            "checkpoint": self.checkpoint,
            "data": self.data,
            "tokenizer": self.tokenizer,
        } | {f"settings.{name}": value for name, value in asdict(self.settings).items()}

    def file_name(self) -> str:
        """The name by which a folder of statistics files knows it."""
        text = json.dumps(self.fields(), sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.stats.safetensors"


def save(path: Path, moments: Mapping[str, Moments], key: Key) -> None:
    """Writes a statistics file; it is whole or absent."""
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{field}": value.clone()  # safetensors refuses tensors that share memory, as those of gate and up do
        for name, each in moments.items()
        for field in _FIELDS
        if (value := getattr(each, field)) is not None
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={_METADATA: json.dumps(key.fields(), sort_keys=True)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def find(folder: Path, key: Key) -> Path | None:
    """The file in a folder that holds the statistics of this key."""
    path = folder / key.file_name()
    return path if path.is_file() else None


def load(path: Path, *, layers: Iterable[str] = (), **expected: Any) -> dict[str, Moments]:
    """Reads a statistics file that must be about the ``expected`` parts of a key and cover the ``layers``.

    >>> load(path, layers=["lm_head.weight"], checkpoint=fingerprint)  # doctest: +SKIP
    """
    found, tensors = _read(path)
    for name, value in {"format": FORMAT, **expected}.items():
        if found.get(name) != value:
            raise CheckpointError(f"{path}: {_mismatch(name)}: its {name} is {found.get(name)}, expected {value}")
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer, _, field = name.rpartition(".")
        parts[layer][field] = tensor
    missing = [layer for layer in layers if layer not in parts]
    if missing:
        more = f", nor of {len(missing) - 1} others" if missing[1:] else ""
        raise CheckpointError(f"{path}: has no statistics of {missing[0]}{more}; calibrate again")
    return {layer: Moments(**fields) for layer, fields in parts.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if _METADATA not in metadata:
                raise CheckpointError(f"{path}: is a safetensors file, but not one of statistics")
            return json.loads(metadata[_METADATA]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 a file is no dict
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such statistics file") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a statistics file: {error}") from None


def _mismatch(name: str) -> str:
    if name == "checkpoint":
        return "was made for another model"
    return "was made by another version of merger" if name == "format" else "was made from other data or settings"
