"""The folder or Hub repository of a model or an adapter: its files, and the tensors that their headers name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from merger.checkpoint.checkpoint import PACKED
from merger.checkpoint.formats import FORMATS, SUFFIXES, format_of
from merger.checkpoint.tensor_info import Info, checked_name
from merger.checkpoint.wrapped_names import plain_names
from merger.errors import CheckpointError, system_reason

MODEL = tuple(format_.model for format_ in FORMATS)
ADAPTER = tuple(format_.adapter for format_ in FORMATS)

_OTHER_WEIGHTS = (*SUFFIXES, ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".npz")


@dataclass(frozen=True)
class Folder:
    """Where a model's or an adapter's files are."""

    label: str  # how messages name the model
    source: str  # how they name the folder
    directory: Path
    names: frozenset[str]  # of its files; those of a Hub repository may still be there
    commit: str | None = None  # of the Hub repository
    remote: Callable[[str], IO[bytes]] | None = None  # opens a file that is not in the directory

    def has(self, name: str) -> bool:
        """Whether a file is in the directory."""
        return name in self.names and (self.directory / name).is_file()


@dataclass(frozen=True)
class Weights:
    """The files that hold the tensors."""

    files: tuple[str, ...]
    index: Mapping[str, str]  # the file of each tensor, as far as an index tells


def local_folder(directory: Path, label: str, commit: str | None = None) -> Folder:
    """A folder on this machine."""
    try:
        names = frozenset(path.name for path in directory.iterdir() if path.is_file())
    except OSError as error:
        raise CheckpointError(f"{label}: {directory}: cannot be read: {system_reason(error)}") from None
    return Folder(label, str(directory), directory, names, commit)


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Reads a JSON object from a file of the folder."""
    label = f"{folder.label}: {folder.source}/{name}"
    try:
        value = json.loads((folder.directory / name).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder.label}: {folder.source} has no {name}; is it a model's folder?") from None
    except OSError as error:
        raise CheckpointError(f"{label}: cannot be read: {system_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{label}: expected a JSON object")
    return value


def find_weights(folder: Folder, names: tuple[str, ...]) -> Weights:
    """Returns the files of the first existing name: one file, or the shards of NAME.index.json."""
    for name in names:
        if name in folder.names:
            return Weights((name,), {})
        if f"{name}.index.json" in folder.names:
            index = _read_index(folder, f"{name}.index.json")
            return Weights(tuple(sorted(set(index.values()))), index)
    if {PACKED, f"{PACKED}.index.json"} & folder.names:
        raise CheckpointError(
            f"{folder.label}: {folder.source} holds several experts, and no model; `merger extract` writes one of them"
        )
    candidates = sorted(name for name in folder.names if name.endswith(_OTHER_WEIGHTS))
    remark = f", only {', '.join(candidates[:3])}" if candidates else ""
    raise CheckpointError(
        f"{folder.label}: {folder.source} has no {' or '.join(names)}{remark}; "
        "save the model there with save_pretrained"
    )


def _read_index(folder: Folder, index_name: str) -> dict[str, str]:
    label = f"{folder.label}: {folder.source}/{index_name}"
    index = read_json(folder, index_name).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{label}: has no weight_map; download it again")
    for name, file in index.items():
        # A plain name beside the index, never a way out of the folder.
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file:
            raise CheckpointError(f"{label}: names {str(file)[:80]!r}, which is not a file in its folder")
        if file not in folder.names:
            raise CheckpointError(f"{label}: names {file!r}, which is missing; download it")
        if format_of(file) is None:
            raise CheckpointError(f"{label}: names {file!r}, expected files that end in {' or '.join(SUFFIXES)}")
        try:
            checked_name(name)
        except ValueError as error:
            raise CheckpointError(f"{label}: {error}") from None
    return index


def read_tensors(folder: Folder, weights: Weights) -> dict[str, Info]:
    """All tensors by the model's names of them, from the headers of the files that hold them."""
    with ThreadPoolExecutor(8) as pool:  # on the Hub a header takes a round trip or two
        headers = list(pool.map(partial(_header, folder), weights.files))
    tensors: dict[str, Info] = {}
    for file, header in zip(weights.files, headers, strict=True):
        for name, info in header.items():
            # As in transformers, what an index forgets belongs to the model all the same.
            if weights.index.get(name, file) != file:
                continue
            if name in tensors:
                raise CheckpointError(f"{folder.label}: {folder.source}: {name} is in two files; the index names none")
            tensors[name] = info
    for name, file in weights.index.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder.label}: {folder.source}/{file}: has no tensor {name}, which the index says it holds"
            )
    if not tensors:
        raise CheckpointError(f"{folder.label}: {folder.source}: its weights hold no tensor; download them again")
    try:
        names = plain_names(tensors)
    except ValueError as error:
        raise CheckpointError(f"{folder.label}: {folder.source}: {error}") from None
    return {names[stored]: info for stored, info in tensors.items()}


def _header(folder: Folder, file: str) -> dict[str, Info]:
    """The tensors of one file, on this machine or in a repository of the Hub."""
    format_ = format_of(file)
    assert format_ is not None, "no other file is a weight file"
    if folder.remote is None or folder.has(file):
        return format_.header(folder.directory / file)
    with folder.remote(file) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        tensors = format_.parse(stream, size, Path(folder.source) / file, with_offsets=False)
    return {name: info._replace(file=None, offset=0) for name, info in tensors.items()}
