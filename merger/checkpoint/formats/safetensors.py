"""safetensors: a JSON header that names each tensor's dtype, shape and place, and then their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from merger._lazy import torch
from merger.checkpoint.disk import CHUNK
from merger.checkpoint.formats.interface import Format, Scan, count_not_finite
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
            entries, end = _entries(file.read(length))
            if 8 + length + end != size:
                raise ValueError(_wrong_size(8 + length + end, size))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: its header is broken: {error}") from None
        return {name: Info(dtype, shape, path, 8 + length + begin) for name, (dtype, shape, begin) in entries.items()}

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


def encode_header(
    tensors: Mapping[str, Info], room: int | None = None, metadata: Mapping[str, str] = MappingProxyType({})
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds the tensors in this order, and where each one's bytes begin.

    ``room`` is the number of bytes of the header's text, where it was set aside before the tensors were known.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
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


_Entry = tuple[str, tuple[int, ...], int]
"""A tensor's dtype, its shape, and the number of bytes between the header and the tensor."""


@lru_cache(256)
def _entries(text: bytes) -> tuple[Mapping[str, _Entry], int]:
    """Returns the checked entries of a header, and the number of bytes that their tensors take.

    Fine-tunes mostly have the very headers of their base, shard by shard, which need to be read once. Raises
    ValueError.
    """
    header = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    if not isinstance(header, dict):
        raise ValueError("it is no JSON object")
    header.pop("__metadata__", None)
    entries = {checked_name(name): _checked_entry(entry) for name, entry in header.items()}
    return entries, _check_tiling(header)


def _checked_entry(entry: Any) -> _Entry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"expected dtype, shape and data_offsets, found {str(entry)[:80]!r}") from None
    for number in (begin, end, *shape) if isinstance(shape, list) else (None,):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"shape and data_offsets must be whole numbers, found {str(entry)[:80]!r}")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise ValueError(f"the dtype {str(dtype)[:20]!r} is unknown")
    if prod(shape) * ITEM_SIZE[dtype] != end - begin:
        raise ValueError(f"{dtype} {str(shape)[:80]} does not take the {end - begin} bytes that its offsets span")
    return dtype, tuple(shape), begin


def _place(tensor: tuple[str, Info]) -> tuple[int, int]:
    return tensor[1].offset, tensor[1].nbytes


def _check_tiling(header: Mapping[str, Any]) -> int:
    """Returns the number of bytes that the tensors of a checked header tile without gap or overlap, or ValueError."""
    position = 0
    for (begin, end), name in sorted((entry["data_offsets"], name) for name, entry in header.items()):
        if begin != position:
            problem = "overlaps the one before it" if begin < position else "leaves a gap before it"
            raise ValueError(f"{name} {problem}; download the file again")
        position = end
    return position


def _wrong_size(end: int, size: int) -> str:
    problem = "the file is truncated" if end > size else "the file is longer than its tensors"
    return f"{problem}: they end at byte {end:,} and it at {size:,}; download it again"
