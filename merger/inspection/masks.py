"""The masks of a packed output: how much each expert holds, and how many experts hold the same positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint.checkpoint import Checkpoint
from merger.planning.packed import Packed, as_columns, mask_of, open_packed

if TYPE_CHECKING:
    import numpy

CHUNK = 1 << 20  # bytes of each mask that are read at a time


def describe(folder: Path, record: Mapping[str, Any], experts: Sequence[str]) -> list[str]:
    """Sentences about the masks in ``folder``: TALL masks' counts of positions by how many experts hold them."""
    import numpy

    sizes, holders = numpy.zeros(len(experts), dtype=numpy.int64), numpy.zeros(len(experts) + 1, dtype=numpy.int64)
    with closing(open_packed(folder)) as stored, closing(as_columns(stored)) as flat:
        for name, entry in record["tensors"].items():
            for masks in _masks(flat, Packed.of(name, experts, entry["packed"])) if "packed" in entry else ():
                sizes += masks.sum(1)
                holders += numpy.bincount(masks.sum(0), minlength=len(experts) + 1)
    positions = int(holders.sum())
    if not positions:
        return ["each expert has weights or factors of its own; there are no masks to compare"]
    by_expert = ", ".join(f"{name} {size / positions:.4f}" for name, size in zip(experts, sizes, strict=True))
    by_number = ", ".join(f"by {k} {size / positions:.4f}" for k, size in enumerate(holders))
    return [
        f"share of {positions:,} positions held: {by_expert}",
        f"share of positions held by so many experts: {by_number}",
    ]


def _masks(flat: Checkpoint, packed: Packed) -> Iterator[numpy.ndarray[Any, Any]]:
    """The masks of a tensor as booleans [k, positions], in pieces; none where it has no bits."""
    result = next((result for result, form in packed.forms.items() if form.holds == "bits"), None)
    if result is None:
        return
    names, size = packed.stored_names(result), packed.bytes_of_bits
    for matrix in range(packed.matrices):
        for first in range(0, size, CHUNK):
            start, stop = matrix * size + first, matrix * size + min(first + CHUNK, size)
            count = min(8 * CHUNK, packed.rows * packed.columns - 8 * first)
            yield torch.stack([mask_of(flat.read_rows(name, start, stop), 1, count)[0] for name in names]).numpy()
