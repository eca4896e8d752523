"""How tensors are dealt out to the files of a checkpoint, and what those files' headers and index say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merger.checkpoint.checkpoint import SINGLE
from merger.checkpoint.safetensors_header import ITEM_SIZE, Info


@dataclass(frozen=True)
class Shard:
    """One output file: its header, and where each tensor's bytes go."""

    file: str
    header: bytes
    offsets: Mapping[str, int]  # of each tensor in the file, in file order
    size: int


def layout(tensors: Sequence[tuple[str, Info]], shard_size: int, whole: str = SINGLE) -> list[Shard]:
    """Deals the tensors out to shards of at most ``shard_size`` bytes (or one larger tensor), in order.

    A single one is named ``whole``, several as in model-00001-of-00003.safetensors.
    """
    groups: list[list[tuple[str, Info]]] = [[]]
    filled = 0
    for name, info in tensors:
        if groups[-1] and filled + info.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append((name, info))
        filled += info.nbytes
    count = len(groups)
    stem = whole.removesuffix(".safetensors")
    names = [whole] if count == 1 else [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(file: str, tensors: list[tuple[str, Info]]) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # widest numbers first, so that every tensor lies at a multiple of its own width
    ordered = sorted(tensors, key=lambda each: -ITEM_SIZE[each[1].dtype])
    offsets, position = {}, 0
    for name, info in ordered:
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        offsets[name] = position
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = {name: start + offset for name, offset in offsets.items()}
    return Shard(file, len(text).to_bytes(8, "little") + text, placed, start + position)


def index_name(shards: Sequence[Shard]) -> str:
    """What the index of several shards is called."""
    return f"{shards[0].file.partition('-')[0]}.safetensors.index.json"


def index(shards: Sequence[Shard], infos: Mapping[str, Info]) -> dict[str, Any]:
    """What the index of several shards says."""
    return {
        "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
        "weight_map": {name: shard.file for shard in shards for name in sorted(shard.offsets)},
    }
