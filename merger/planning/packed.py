"""The stored tensors of a pack: their names, their sizes, and their bytes; docs/experts.md.

A tensor is one matrix, or several of packed experts one after another; each result lies there as often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint.checkpoint import PACKED, Checkpoint
from merger.checkpoint.folder import find_weights, local_folder, read_tensors
from merger.checkpoint.tensor_info import Info
from merger.errors import CheckpointError
from merger.ops.questions import Flow, PrefixSum
from merger.pipeline.registry import Form

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """One tensor's results, by the names that its pack gives them."""

    name: str
    by: str  # the pack
    experts: tuple[str, ...]
    forms: Mapping[str, Form]
    info: Info  # the tensor as it is in every expert
    rows: int  # of a matrix, as the pack sees it
    columns: int
    matrices: int
    transposed: bool  # stored [in, out]; the pack sees [out, in]

    @cached_property
    def infos(self) -> dict[str, Info]:
        """All that is stored, by name."""
        return {name: self._info(form) for result, form in self.forms.items() for name in self.stored_names(result)}

    def stored_names(self, result: str) -> list[str]:
        """The names under which a result is stored: one that all share, or one for each expert."""
        if self.forms[result].shared:
            return [self.stored_name(result, "")]
        return [self.stored_name(result, expert) for expert in self.experts]

    def stored_name(self, result: str, expert: str) -> str:
        """NAME:result.expert, or NAME:result where all share it; the tensor's own name for weights that all share."""
        form = self.forms[result]
        if not form.shared:
            return f"{self.name}:{result}.{expert}"
        return self.name if form.holds == "weights" else f"{self.name}:{result}"

    def _info(self, form: Form) -> Info:
        leading_shape = () if self.matrices == 1 else (self.matrices,)
        if form.holds == "weights":
            return Info(self.info.dtype, self.info.shape)
        if form.holds == "bits":
            return Info("U8", (*leading_shape, self.bytes_of_bits))
        if form.holds == "chosen":
            return Info(self.info.dtype, (*leading_shape, form.count))
        return Info("F32" if form.holds == "floats" else self.info.dtype, (*leading_shape, *form.shape))

    @property
    def bytes_of_bits(self) -> int:
        """Bytes that a bit for every element of a matrix takes."""
        return -(-self.rows * self.columns // 8)

    def as_record(self) -> dict[str, Any]:
        """Returns the entry of the manifest from which an expert is rebuilt."""
        results = {
            result: {key: value for key, value in asdict(form).items() if value} for result, form in self.forms.items()
        }
        return {
            "by": self.by,
            "dtype": self.info.dtype,
            "shape": list(self.info.shape),
            "rows": self.rows,
            "columns": self.columns,
            "matrices": self.matrices,
            "transposed": self.transposed,
            "results": results,
        }

    @classmethod
    def of(cls, name: str, experts: Sequence[str], record: Mapping[str, Any]) -> Packed:
        """Parses the manifest's entry of the tensor ``name``; raises CheckpointError for an invalid entry."""
        try:
            results = record["results"].items()
            forms = {result: Form(**{**form, "shape": tuple(form.get("shape", ()))}) for result, form in results}
            info = Info(record["dtype"], tuple(record["shape"]))
            sizes = {key: int(record[key]) for key in ("rows", "columns", "matrices")}
            return cls(name, record["by"], tuple(experts), forms, info, **sizes, transposed=bool(record["transposed"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(f"merger.json: what it says of {name} cannot be understood; run it again") from None

    def weights(self, results: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The task vectors that are stored as weights, by stored name."""
        for result, form in self.forms.items():
            if form.holds == "weights":
                yield from self.stored_parts(result, results[result])

    def stored_parts(self, result: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors of a result with their stored names: one shared tensor, or one for each expert."""
        parts = (values,) if self.forms[result].shared else values
        yield from zip(self.stored_names(result), parts, strict=True)


Piece = tuple[str, int, "Tensor"]
"""A stored tensor's name, the number of its elements that come before, and some that follow."""


def pieces(packed: Packed, results: Mapping[str, Tensor], matrix: int, first: int) -> Flow[list[Piece]]:
    """Returns the stored pieces of a slice, except weights; ``first`` is the slice's first element in the matrix."""
    pieces: list[Piece] = []
    for result, form in packed.forms.items():
        parts = list(packed.stored_parts(result, results[result]))
        if form.holds == "bits":
            pieces += [(name, matrix * packed.bytes_of_bits + first // 8, bits_of(mask)) for name, mask in parts]
        elif form.holds == "chosen":
            masks = results[form.at]
            offsets = (yield PrefixSum(partial(_row_counts, masks))).tolist()
            for (name, values), mask, skipped in zip(parts, masks, offsets, strict=True):
                pieces.append((name, matrix * form.count + skipped, values[mask]))
        elif form.holds in ("floats", "factors") and first == 0:
            pieces += [(name, matrix * values.numel(), values) for name, values in parts]
    return pieces


def _row_counts(masks: Tensor) -> Tensor:
    """The number of true elements of each mask: [k]."""
    return masks.flatten(1).sum(1)


def open_packed(folder: Path) -> Checkpoint:
    """Opens the stored tensors of a packed output; raises CheckpointError if they cannot be read."""
    packed_folder = local_folder(folder, "packed")
    tensors = read_tensors(packed_folder, find_weights(packed_folder, (PACKED,)))
    return Checkpoint("packed", folder, tensors, {})


def as_columns(packed: Checkpoint) -> Checkpoint:
    """The same tensors, each as one column of numbers, of which any can be read."""
    columns = {name: info._replace(shape=(info.elements, 1)) for name, info in packed.tensors.items()}
    return Checkpoint(packed.label, packed.directory, columns, {})


def bits_of(mask: Tensor) -> Tensor:
    """Booleans [r c] as bytes, eight to each in flat order, the first in the lowest bit."""
    import numpy

    return torch.from_numpy(numpy.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def mask_of(stored: Tensor, rows: int, columns: int) -> Tensor:
    """The booleans [r c] again."""
    import numpy

    flat = numpy.unpackbits(stored.numpy().reshape(-1), count=rows * columns, bitorder="little")
    return torch.from_numpy(flat.astype(bool).reshape(rows, columns))
