"""The distribution of tensors to the files of a checkpoint, and these files' headers and index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merger.checkpoint.checkpoint import SINGLE
from merger.checkpoint.formats.safetensors import encode_header
from merger.checkpoint.tensor_info import ITEM_SIZE, Info


@dataclass(frozen=True)
class Shard:
    """One output file: its header, and where each tensor's bytes go."""

    file: str
    header: bytes
    offsets: Mapping[str, int]  # of each tensor in the file, in file order
    size: int


def layout(tensors: Sequence[tuple[str, Info]], shard_size: int, file: str = SINGLE) -> list[Shard]:
    """Deals the tensors out to shards of at most ``shard_size`` bytes (or one larger tensor), in order.

    A single one is named ``file``, several as in model-00001-of-00003.safetensors.
    """
    groups: list[list[tuple[str, Info]]] = [[]]
    size = 0
    for name, info in tensors:
        if groups[-1] and size + info.nbytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append((name, info))
        size += info.nbytes
    count = len(groups)
    stem = file.removesuffix(".safetensors")
    names = [file] if count == 1 else [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(file: str, tensors: list[tuple[str, Info]]) -> Shard:
    # widest numbers first, so that every tensor lies at a multiple of its own width
    ordered = dict(sorted(tensors, key=lambda tensor: -ITEM_SIZE[tensor[1].dtype]))
    header, offsets = encode_header(ordered)
    return Shard(file, header, offsets, len(header) + sum(info.nbytes for info in ordered.values()))


def index_name(shards: Sequence[Shard]) -> str:
    """Returns the file name of the index of shards."""
    return f"{shards[0].file.partition('-')[0]}.safetensors.index.json"


def index(shards: Sequence[Shard], infos: Mapping[str, Info]) -> dict[str, Any]:
    """Returns the content of the index of shards."""
    return {
        "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
        "weight_map": {name: shard.file for shard in shards for name in sorted(shard.offsets)},
    }
