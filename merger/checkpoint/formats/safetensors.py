"""safetensors: a JSON header that names each tensor's dtype, shape and place, and then their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from merger._lazy import torch
from merger.checkpoint.formats.interface import CHUNK, Format, Scan, count_not_finite
from merger.checkpoint.tensor_info import ITEM_SIZE, Info, checked_name, torch_dtype
from merger.errors import CheckpointError

MAX_HEADER = 100_000_000  # the format's own cap


class Safetensors(Format):
    """The format of Hugging Face; nothing in a header is believed before it was checked against the format's rules."""

    order = 0
    suffix = ".safetensors"
    model = "model.safetensors"
    adapter = "adapter_model.safetensors"

    def parse(self, file: IO[bytes], size: int, path: Path, *, with_offsets: bool = True) -> dict[str, Info]:
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

    def scan(self, path: Path, header: Mapping[str, Info], tell: Callable[[int], None]) -> Scan:
        """Hashes the file and looks at its values in one pass over its bytes."""
        not_finite: dict[str, int] = {}
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(CHUNK))
        with path.open("rb") as file:
            # The header was checked: tensors tile the file, so that reading them in order misses no byte of it.
            digest.update(file.read(min((info.offset for info in header.values()), default=-1)))
            for name, info in sorted(header.items(), key=_place):
                for start in range(0, info.nbytes, CHUNK):
                    piece = buffer[: min(CHUNK, info.nbytes - start)]
                    if file.readinto(piece) < len(piece):
                        raise CheckpointError(f"{path}: ended while it was being read")
                    digest.update(piece)
                    if info.is_float and (bad := count_not_finite(torch.frombuffer(piece, dtype=torch_dtype(info)))):
                        not_finite[name] = not_finite.get(name, 0) + bad
                    tell(len(piece))
        return Scan(digest.hexdigest(), not_finite)


FORMAT = Safetensors()


def encode_header(tensors: Mapping[str, Info], room: int | None = None) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds the tensors in this order, and where each one's bytes begin.

    ``room`` is the number of bytes of the header's text, where it was set aside before the tensors were known.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, starts = 0, {}
    for name, info in tensors.items():
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        starts[name] = position
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8 if room is None else room - len(text))
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


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


def _place(tensor: tuple[str, Info]) -> tuple[int, int]:
    return tensor[1].offset, tensor[1].nbytes


def _check_tiling(tensors: dict[str, Info], start: int, size: int) -> None:
    position = start
    for offset, nbytes, name in sorted((info.offset, info.nbytes, name) for name, info in tensors.items()):
        if offset != position:
            problem = "overlaps the one before it" if offset < position else "leaves a gap before it"
            raise ValueError(f"{name} {problem}; download the file again")
        position += nbytes
    if position != size:
        problem = "the file is truncated" if position > size else "the file is longer than its tensors"
        raise ValueError(f"{problem}: they end at byte {position:,} and it at {size:,}; download it again")
