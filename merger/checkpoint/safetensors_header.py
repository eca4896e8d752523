"""The header of a safetensors file, checked against the format's own rules before anything is believed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any

from merger.errors import CheckpointError

MAX_HEADER = 100_000_000  # the format's own cap

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8,
}  # fmt: skip
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TORCH_NAMES = FLOATS | {
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64",
}  # fmt: skip
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Info:
    """One stored tensor: what it is, and where its bytes lie."""

    dtype: str  # as safetensors writes it: BF16, F32, I64, ...
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0  # of its first byte in the file
    strides: tuple[int, ...] | None = None  # between its elements, where a pickle stores it out of row order

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.elements * ITEM_SIZE[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers that can be merged."""
        return self.dtype in FLOATS

    @property
    def matrix(self) -> tuple[int, int]:
        """Its rows and columns, as `rows_and_columns` counts them."""
        return rows_and_columns(self.shape)


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """All axes but the last as rows, and the last as columns; a vector or a number is one row."""
    return (prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, prod(shape))


def read_header(path: Path) -> dict[str, Info]:
    """All tensors of a safetensors file; CheckpointError names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            return parse_header(file, path.stat().st_size, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def parse_header(file: IO[bytes], size: int, path: Path) -> dict[str, Info]:
    """Reads and checks the header: length, JSON, dtypes, and offsets that tile the file without gap or overlap."""
    if size < 8:
        raise CheckpointError(f"{path}: is {size} bytes, too short for a safetensors file; download it again")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path}: its header claims {length:,} bytes, more than the format allows")
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: its header claims {length:,} bytes but the file has {size:,}; "
            "it is truncated or no safetensors file; download it again"
        )
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        header.pop("__metadata__", None)
        tensors = {checked_name(name): _info(entry, path, 8 + length) for name, entry in header.items()}
        _check_tiling(tensors, 8 + length, size)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is broken: {error}") from None
    return tensors


def checked_name(name: str) -> str:
    """A tensor's name, if a terminal, a log and a JSON file can carry it; ValueError otherwise."""
    if not name.isprintable():  # line breaks, escape sequences, lone surrogates
        raise ValueError(f"the name {name!r} has characters that cannot be printed")
    return name


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name stands in it twice")
    return entries


def _info(entry: Any, path: Path, start: int) -> Info:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"expected dtype, shape and data_offsets, found {str(entry)[:80]!r}") from None
    numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise ValueError(f"shape and data_offsets must be whole numbers, found {str(entry)[:80]!r}")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise ValueError(f"the dtype {str(dtype)[:20]!r} is unknown")
    info = Info(dtype, tuple(shape), path, start + begin)
    if info.nbytes != end - begin:
        raise ValueError(f"{dtype} {str(shape)[:80]} does not take the {end - begin} bytes that its offsets span")
    return info


def _check_tiling(tensors: dict[str, Info], start: int, size: int) -> None:
    position = start
    for name, info in sorted(tensors.items(), key=lambda each: (each[1].offset, each[1].nbytes)):
        if info.offset != position:
            problem = "overlaps the one before it" if info.offset < position else "leaves a gap before it"
            raise ValueError(f"{name} {problem}; download the file again")
        position += info.nbytes
    if position != size:
        problem = "the file is truncated" if position > size else "the file is longer than its tensors"
        raise ValueError(f"{problem}: they end at byte {position:,} and it at {size:,}; download it again")
