"""What a pack makes of a tensor, as stored tensors: their names, their sizes, and their bytes; docs/experts.md.

A tensor is one matrix, or several of packed experts one after another; each result lies there as often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
        several = () if self.matrices == 1 else (self.matrices,)
        if form.holds == "weights":
            return Info(self.info.dtype, self.info.shape)
        if form.holds == "bits":
            return Info("U8", (*several, self.bytes_of_bits))
        if form.holds == "chosen":
            return Info(self.info.dtype, (*several, form.count))
        return Info("F32" if form.holds == "floats" else self.info.dtype, (*several, *form.shape))

    @property
    def bytes_of_bits(self) -> int:
        """Bytes that a bit for every element of a matrix takes."""
        return -(-self.rows * self.columns // 8)

    def recorded(self) -> dict[str, Any]:
        """What the manifest says of it, for whoever rebuilds an expert."""
        results = {
            result: {key: each for key, each in asdict(form).items() if each} for result, form in self.forms.items()
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
    def of(cls, name: str, experts: Sequence[str], said: Mapping[str, Any]) -> Packed:
        """What `recorded` says of the tensor ``name``; CheckpointError where that cannot be understood."""
        try:
            results = said["results"].items()
            forms = {result: Form(**{**form, "shape": tuple(form.get("shape", ()))}) for result, form in results}
            info = Info(said["dtype"], tuple(said["shape"]))
            sizes = {key: int(said[key]) for key in ("rows", "columns", "matrices")}
            return cls(name, said["by"], tuple(experts), forms, info, **sizes, transposed=bool(said["transposed"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(f"merger.json: what it says of {name} cannot be understood; run it again") from None

    def weights(self, results: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The task vectors that are stored as weights, by stored name."""
        for result, form in self.forms.items():
            if form.holds == "weights":
                yield from self.each(result, results[result])

    def each(self, result: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A result as it is stored: its one tensor, or every expert's, by stored name."""
        several = (values,) if self.forms[result].shared else values
        yield from zip(self.stored_names(result), several, strict=True)


Piece = tuple[str, int, "Tensor"]
"""A stored tensor's name, the number of its elements that come before, and some that follow."""


def pieces(packed: Packed, results: Mapping[str, Tensor], matrix: int, first: int) -> Flow[list[Piece]]:
    """What is stored of a slice that begins with element ``first`` of a tensor's matrix, all but the weights."""
    found: list[Piece] = []
    for result, form in packed.forms.items():
        several = list(packed.each(result, results[result]))
        if form.holds == "bits":
            found += [(name, matrix * packed.bytes_of_bits + first // 8, bits_of(mask)) for name, mask in several]
        elif form.holds == "chosen":
            masks = results[form.at]
            before = (yield PrefixSum(partial(_row_counts, masks))).tolist()
            for (name, values), mask, skipped in zip(several, masks, before, strict=True):
                found.append((name, matrix * form.count + skipped, values[mask]))
        elif form.holds in ("floats", "factors") and first == 0:
            found += [(name, matrix * values.numel(), values) for name, values in several]
    return found


def _row_counts(masks: Tensor) -> Tensor:
    """The number of true elements of each mask: [k]."""
    return masks.flatten(1).sum(1)


def open_packed(folder: Path) -> Checkpoint:
    """The stored tensors of an output that holds several experts; CheckpointError if they cannot be read."""
    found = local_folder(folder, "packed")
    tensors = read_tensors(found, find_weights(found, (PACKED,)))
    return Checkpoint("packed", folder, tensors, {})


def as_columns(packed: Checkpoint) -> Checkpoint:
    """The same tensors, each as one column of numbers, of which any can be read."""
    columns = {name: replace(info, shape=(info.elements, 1)) for name, info in packed.tensors.items()}
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
