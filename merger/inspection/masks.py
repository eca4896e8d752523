"""What the masks of a packed output say: how much each expert holds, and how many hold the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint.stored import Checkpoint
from merger.methods._registry import Form
from merger.packing import as_columns, mask_of, open_packed, stored_name

if TYPE_CHECKING:
    import numpy

CHUNK = 1 << 20  # bytes of each mask that are looked at together


def is_packed(record: Mapping[str, Any]) -> bool:
    """Whether a manifest is that of several experts."""
    return any("packed" in said for said in record["tensors"].values())


def told(folder: Path, record: Mapping[str, Any], experts: Sequence[str]) -> list[str]:
    """Sentences about the masks in ``folder``: TALL masks' counts of positions by how many experts hold them."""
    import numpy

    each, together = numpy.zeros(len(experts), dtype=numpy.int64), numpy.zeros(len(experts) + 1, dtype=numpy.int64)
    with closing(open_packed(folder)) as packed, closing(as_columns(packed)) as flat:
        for name, said in record["tensors"].items():
            for masks in _masks(flat, name, said.get("packed"), experts):
                each += masks.sum(1)
                together += numpy.bincount(masks.sum(0), minlength=len(experts) + 1)
    positions = int(together.sum())
    if not positions:
        return ["each expert has weights or factors of its own; there are no masks to compare"]
    own = ", ".join(f"{name} {count / positions:.4f}" for name, count in zip(experts, each, strict=True))
    shared = ", ".join(f"by {k} {count / positions:.4f}" for k, count in enumerate(together))
    return [f"share of {positions:,} positions held: {own}", f"share of positions held by so many experts: {shared}"]


def _masks(
    flat: Checkpoint, name: str, said: Mapping[str, Any] | None, experts: Sequence[str]
) -> Iterator[numpy.ndarray[Any, Any]]:
    """The masks of a tensor as 0 and 1 [k, positions], some at a time."""
    if said is None or "bits" not in (form["holds"] for form in said["results"].values()):
        return
    result, form = next((result, Form(**each)) for result, each in said["results"].items() if each["holds"] == "bits")
    names = [stored_name(name, result, form, expert) for expert in experts]
    positions = said["rows"] * said["columns"]
    size = -(-positions // 8)
    for matrix in range(said["matrices"]):
        for i in range(0, size, CHUNK):
            start, stop = matrix * size + i, matrix * size + min(i + CHUNK, size)
            count = min(8 * CHUNK, positions - 8 * i)
            yield torch.stack([mask_of(flat.read_rows(each, start, stop), 1, count)[0] for each in names]).numpy()
