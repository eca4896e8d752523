"""Statistics files: the moments of one expert's inputs, stored for later runs and for other machines.

Gram matrices are as large as the model, so where they are kept at all it is in a folder, a file for each block
that is written when the block is done: `00000.safetensors` on, and `outside.safetensors` last, which says that all
are there. A matrix is the float32 numbers of its upper triangle, row by row; one that several tensors share, as q, k
and v do, is in the file once.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.calibration.moments import Moments
from merger.checkpoint.files import check_replaceable, make_folder, replacing
from merger.checkpoint.hashes import sha256
from merger.errors import CheckpointError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.settings import ForwardPass, Settings

FORMAT = 2  # since 2 the key has the forward pass, and the checkpoint its config
_FIELDS = ("count", "second_moment", "mean", "token_share")
GRAMS = ".grams"
_LAST = "outside.safetensors"
_CONTENTS = {
    None: "statistics of inputs",
    "fisher": "the Fisher information of weights",
    "coefficients": "coefficients that were learned",
}
"""What a file holds, by its own word for it, which is also how its name ends."""
_METADATA = "merger.statistics"  # a single entry, since safetensors writes several in any order


@dataclass(frozen=True)
class StatisticsKey:
    """Everything that decides the content of a statistics file."""

    checkpoint: str  # a fingerprint of the expert's weights and config
    data: str
    tokenizer: str
    settings: Settings
    forward: ForwardPass
    format: int = FORMAT

    def fields(self) -> dict[str, Any]:
        """Returns the parts of the key by name, with the settings and the forward pass flattened."""
        return {
            "format": self.format,
            "checkpoint": self.checkpoint,
            "data": self.data,
            "tokenizer": self.tokenizer,
            **{f"settings.{name}": value for name, value in asdict(self.settings).items()},
            **{f"forward.{name}": value for name, value in asdict(self.forward).items()},
        }

    def file_name(self) -> str:
        """Returns the name of the statistics file of this key."""
        text = json.dumps(self.fields(), sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.stats.safetensors"

    def folder_name(self) -> str:
        """Returns the name of the folder of the same statistics with Gram matrices."""
        return self.file_name().replace(".stats.safetensors", GRAMS)


def save(path: Path, moments: Mapping[str, Moments], key: StatisticsKey) -> None:
    """Writes a statistics file atomically."""
    write(path, _small_tensors(moments), key.fields())


def _small_tensors(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Returns the tensors of all moments except Gram matrices, by tensor name and field."""
    return {
        f"{name}.{field}": value.clone()  # safetensors refuses tensors that share memory, as those of gate and up do
        for name, tensor_moments in moments.items()
        for field in _FIELDS
        if (value := getattr(tensor_moments, field)) is not None
    }


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors, and the fields of a key, as one file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    make_folder(path.parent)
    try:
        with replacing(path) as partial_file:
            save_file(dict(tensors), partial_file, metadata=metadata_of(metadata))
    except SafetensorError as error:  # which does not say whether the disk is full
        raise ResourceError(f"{path}: cannot be written: {error}") from None


def metadata_of(fields: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file with these fields, such as those of a key."""
    return {_METADATA: json.dumps(fields, sort_keys=True)}


def check_key(path: Path, **expected: Any) -> None:
    """Raises CheckpointError where a part of a file's key is another one; only the header is read."""
    with _open(path) as file:
        _check(path, _fields(path, file), **expected)


def copy(paths: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Copies each expert's file to NAME.stats.safetensors, or by what it holds; RecipeError where others are."""
    kinds = {
        name: next((word for word in _CONTENTS if word and f".{word}." in path.name), "stats")
        for name, path in paths.items()
    }
    copies = {name: folder / f"{name}.{kind}.safetensors" for name, kind in kinds.items()}
    make_folder(folder)
    for target in copies.values():
        check_replaceable(target, is_ours=_is_statistics)
    for name, path in paths.items():
        with replacing(copies[name]) as new:
            shutil.copyfile(path, new)
    return copies


def _is_statistics(path: Path) -> bool:
    try:
        with _open(path) as file:
            return bool(_fields(path, file))
    except CheckpointError:
        return False


def find(folder: Path, key: StatisticsKey) -> Path | None:
    """The file in a folder that holds the statistics of this key."""
    path = folder / key.file_name()
    return path if path.is_file() else None


def load_key(path: Path) -> dict[str, Any]:
    """Reads the key of a file; CheckpointError where it is no such file."""
    with _open(path) as file:
        return _fields(path, file)


def load_values(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a file as they are."""
    return _read(path, True)[1]


def load_file(path: Path, *, layers: Iterable[str] = (), **expected: Any) -> dict[str, Moments]:
    """Reads statistics, but no Gram matrices; about the ``expected`` parts of a key, and covering the ``layers``.

    >>> load_file(path, layers=["lm_head.weight"], checkpoint=fingerprint)  # doctest: +SKIP
    """
    statistics = {
        name: tensor_moments
        for file in _files(path)
        for name, tensor_moments in _moments(file, False, **expected).items()
    }
    missing = [layer for layer in layers if layer not in statistics]
    if missing:
        remainder = f", nor of {len(missing) - 1} others" if missing[1:] else ""
        raise CheckpointError(f"{path}: has no statistics of {missing[0]}{remainder}; calibrate again")
    return statistics


def _files(path: Path) -> list[Path]:
    """The file, or those of a folder in the order of blocks."""
    if not path.is_dir():
        return [path]
    if not (path / _LAST).is_file():
        raise CheckpointError(f"{path}: its Gram matrices are not all there; merger calibrate --gram goes on with them")
    return sorted(path.glob("*.safetensors"))  # digits come before letters


def _moments(path: Path, gram: bool, **expected: Any) -> dict[str, Moments]:
    """Reads the moments of one file, with Gram matrices or without."""
    metadata, tensors = _read(path, gram)
    _check(path, metadata, holds=None, **expected)
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer, _, field = name.rpartition(".")
        parts[layer][field] = tensor
    twins = metadata.get("same", {})
    grams = {name: _symmetric_matrix(fields.pop("gram")) for name, fields in parts.items() if "gram" in fields}
    return {name: Moments(**fields, gram=grams.get(twins.get(name, name))) for name, fields in parts.items()}


def _check(path: Path, metadata: Mapping[str, Any], **expected: Any) -> None:
    """Raises CheckpointError where a part of a file's key is another one."""
    for name, value in {"format": FORMAT, **expected}.items():
        if metadata.get(name) == value:
            continue
        if name == "holds":
            content, need = (_CONTENTS.get(word, "something else") for word in (metadata.get("holds"), value))
            raise CheckpointError(f"{path}: holds {content}, and what is needed is {need}")
        raise CheckpointError(f"{path}: {_mismatch(name)}: its {name} is {metadata.get(name)}, expected {value}")


# --- with Gram matrices ---------------------------------------------------------------------------


def save_block(folder: Path, number: int, unit: str, moments: Mapping[str, Moments], key: StatisticsKey) -> None:
    """Writes the moments of one block with Gram matrices; modules outside the blocks have an empty ``unit``."""
    twins: dict[str, str] = {}
    grams: dict[str, Tensor] = {}
    for name, tensor_moments in moments.items():
        if tensor_moments.gram is None:
            continue
        twin = next(
            (earlier_name for earlier_name, gram in grams.items() if torch.equal(gram, tensor_moments.gram)), None
        )
        if twin is None:
            grams[name] = tensor_moments.gram
        else:
            twins[name] = twin
    triangles = {f"{name}.gram": _upper_triangle(gram) for name, gram in grams.items()}
    path = folder / (f"{number:05}.safetensors" if unit else _LAST)
    write(path, {**_small_tensors(moments), **triangles}, {**key.fields(), "unit": unit, "same": twins})


def finished_units(folder: Path, key: StatisticsKey) -> set[str]:
    """Returns the blocks that an earlier run finished; raises CheckpointError for a folder of another key."""
    units = set()
    for path in folder.glob("*.safetensors"):
        with _open(path) as file:
            metadata = _fields(path, file)
        if {name: metadata.get(name) for name in key.fields()} != key.fields():
            raise CheckpointError(
                f"{path}: was made from another model, data or settings; remove it, or write elsewhere"
            )
        units.add(metadata["unit"])
    return units


def is_complete(folder: Path) -> bool:
    """Whether a folder holds the Gram matrices of a whole model."""
    return (folder / _LAST).is_file()


def blocks(folder: Path, **expected: Any) -> Iterator[tuple[str, dict[str, Moments]]]:
    """Yields each block of a folder with the moments of its tensors' inputs."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: has no Gram matrices; merger calibrate --gram makes a folder of them")
    for path in _files(folder):
        yield path.stem, _moments(path, True, **expected)


def digest(path: Path) -> str:
    """The SHA-256 of a statistics file, or of the names and SHA-256s of a folder's."""
    if not path.is_dir():
        return sha256(path)
    lines = (f"{file.name} {sha256(file)}\n" for file in _files(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _upper_triangle(gram: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix [.. i i], row by row: [.. i(i+1)/2]."""
    rows, columns = torch.triu_indices(gram.shape[-1], gram.shape[-1])
    return gram[..., rows, columns].contiguous()


def _symmetric_matrix(triangle: Tensor) -> Tensor:
    """The matrix of an upper triangle."""
    size = (math.isqrt(8 * triangle.shape[-1] + 1) - 1) // 2
    rows, columns = torch.triu_indices(size, size)
    gram = triangle.new_empty(*triangle.shape[:-1], size, size)
    gram[..., rows, columns] = triangle
    gram[..., columns, rows] = triangle
    return gram


def _read(path: Path, gram: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with _open(path) as file:
        fields = _fields(path, file)
        names = [name for name in file.keys() if gram or not name.endswith(".gram")]  # noqa: SIM118 a file is no dict
        return fields, {name: file.get_tensor(name) for name in names}


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such statistics file") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a statistics file: {error}") from None


def _fields(path: Path, file: Any) -> dict[str, Any]:
    """The fields that `metadata_of` wrote."""
    metadata = file.metadata() or {}
    if _METADATA not in metadata:
        raise CheckpointError(f"{path}: is a safetensors file, but not one of statistics")
    fields: dict[str, Any] = json.loads(metadata[_METADATA])
    return fields


def _mismatch(name: str) -> str:
    if name == "checkpoint":
        return "was made for another model (weights or config.json)"
    return "was made by another version of merger" if name == "format" else "was made from other data or settings"
