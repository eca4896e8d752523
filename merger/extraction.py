"""One expert of a packed output as a checkpoint of its own; docs/experts.md has the layout."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint import manifest
from merger.checkpoint.header import Info
from merger.checkpoint.layout import layout
from merger.checkpoint.opening import open_checkpoint
from merger.checkpoint.stored import Checkpoint, torch_dtype
from merger.checkpoint.writer import Writer, check_output, write_text
from merger.copies import restored
from merger.errors import CheckpointError, RecipeError, nearest
from merger.inspection import manifests
from merger.inspection.masks import is_packed
from merger.machine import SLICE, tuned
from merger.methods._registry import ENTRIES, Form
from merger.packing import as_columns, mask_of, open_packed, stored_name
from merger.record import RECORD

if TYPE_CHECKING:
    from torch import Tensor

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Extraction:
    """What was written."""

    output: str
    expert: str
    seconds: float
    bytes_written: int

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return asdict(self)


def extract(
    folder: str | Path,
    expert: str,
    output: str | Path,
    *,
    base: str | None = None,
    offline: bool = False,
    force: bool = False,
    progress: Tell | None = None,
) -> Extraction:
    """Writes one expert of a packed output as a checkpoint, which appears whole or not at all.

    It is rebuilt from the packed files and the base they were made with: ``base`` where that is no longer where the
    manifest says. Raises a `MergerError` for whatever the user can mend.
    """
    began = time.monotonic()
    source, target = Path(folder), Path(output)
    record = _record(source, expert)
    with (
        closing(open_packed(source)) as packed,
        closing(as_columns(packed)) as flat,
        closing(_base(source, record, base, offline)) as model,
    ):
        check_output(target, [packed.directory, model.directory], force=force)
        sources = _Sources(expert, packed, flat, model)
        tensors = {name: _fate(name, record["tensors"], packed) for name in record["tensors"]}
        infos = {name: tensor.info if isinstance(tensor, _Tensor) else tensor for name, tensor in tensors.items()}
        shards = layout(list(infos.items()), record["recipe"]["output"]["shard_size"])
        writer = Writer(target, shards, infos, {"expert": expert, "packed": _digest(source)})
        try:
            writer.open(force=force)
            _write(sources, tensors, writer, progress or _silent)
            _write_side_files(source, target.name, expert, record, writer.folder)
            writer.digests()
            writer.finish(force=force)
        except BaseException:
            writer.abandon()
            raise
    size = sum(info.nbytes for info in infos.values())
    return Extraction(str(target), expert, round(time.monotonic() - began, 3), size)


# --- what it is made of ---------------------------------------------------------------------------


def _record(folder: Path, expert: str) -> dict[str, Any]:
    """The manifest of an output that holds this expert."""
    record = manifests.read(folder)
    if not is_packed(record):
        raise CheckpointError(f"{folder}: is one model, not several experts; there is nothing to extract")
    experts = list(record["recipe"]["experts"])
    if expert not in experts:
        raise RecipeError(f"{folder}: holds no expert {expert!r}; {nearest(expert, experts)}")
    return record


def _base(folder: Path, record: Mapping[str, Any], given: str | None, offline: bool) -> Checkpoint:
    """The base that the experts were packed against; CheckpointError if it is gone, or another one by now."""
    said = manifests.base(record, folder, given)
    model = open_checkpoint(said["model"], said.get("adapter"), label="base", folder=Path.cwd(), offline=offline)
    if (wrong := manifests.other_files(record, "base", model)) is not None:
        model.close()
        raise CheckpointError(f"{wrong}, and no expert can be rebuilt on another; --base says where it is")
    return model


def _fate(name: str, fates: Mapping[str, Any], packed: Checkpoint) -> _Tensor | Info:
    """How a tensor of the expert is rebuilt, or what it is where all experts have it as it lies in the files."""
    said = fates[name]
    of = said.get("tied to", name)
    if "packed" in fates[of]:
        return _Tensor.recorded(of, fates[of])
    if name not in packed.tensors:
        raise CheckpointError(f"{packed.directory}: has no tensor {name}, which its manifest names; verify it")
    return packed.tensors[name]


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()


def _write(sources: _Sources, tensors: Mapping[str, _Tensor | Info], writer: Writer, tell: Tell) -> None:
    done, total = 0, sum((each.info if isinstance(each, _Tensor) else each).nbytes for each in tensors.values())
    with tuned():
        for name, each in tensors.items():
            position = 0
            pieces = _rebuilt(sources, each) if isinstance(each, _Tensor) else _copied(sources.packed, name)
            for values in pieces:
                data = values.contiguous().flatten().view(torch.uint8).numpy().data
                writer.write(name, position, data)
                position += len(data)
                done += len(data)
                tell("extracting", done, total)
            writer.done(name)


def _copied(packed: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor that all experts share, as it lies in the files."""
    rows, columns = packed.tensors[name].matrix
    step = max(1, SLICE // max(1, columns))
    for start in range(0, rows if columns else 0, step):
        yield packed.read_rows(name, start, min(start + step, rows))


def _write_side_files(source: Path, title: str, expert: str, record: Mapping[str, Any], folder: Path) -> None:
    """Config, tokenizer and the rest as they lie beside the packed files, and a card."""
    manifest.copy_side_files({name: source / name for name in record["files"]}, folder)
    base = record["inputs"]["base"]["source"]
    write_text(folder / "README.md", manifest.extracted_card(title, base, expert, source.name))


def _silent(*_: object) -> None:
    """Tells nobody."""


# --- one tensor -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sources:
    """The open files that an expert is rebuilt from."""

    expert: str
    packed: Checkpoint
    flat: Checkpoint  # the same, every tensor as one column of numbers
    base: Checkpoint


@dataclass(frozen=True)
class _Tensor:
    """How one tensor of the expert was packed, as the manifest has it."""

    name: str
    read: str  # the base's tensor
    info: Info
    by: str
    forms: Mapping[str, Form]
    matrices: int
    rows: int
    columns: int
    transposed: bool

    @classmethod
    def recorded(cls, name: str, said: Mapping[str, Any]) -> _Tensor:
        """What the manifest says of the tensor ``name``."""
        packed = said["packed"]
        return cls(
            name=name,
            read=said.get("reads", {}).get("base", name),
            info=Info(packed["dtype"], tuple(packed["shape"])),
            by=packed["by"],
            forms={result: Form(**form) for result, form in packed["results"].items()},
            matrices=packed["matrices"],
            rows=packed["rows"],
            columns=packed["columns"],
            transposed=packed.get("transposed", False),
        )

    def stored(self, result: str, expert: str) -> str:
        """The name of the stored tensor that holds an expert's result."""
        return stored_name(self.name, result, self.forms[result], expert)

    def slices(self) -> Iterator[range]:
        """Rows of a matrix that are rebuilt together: all where another orientation or factors need them."""
        whole = self.transposed or any(form.holds == "factors" for form in self.forms.values())
        unit = 8 // math.gcd(8, self.columns)  # so that bits begin with a byte
        step = self.rows if whole else max(1, SLICE // (self.columns * unit)) * unit
        for start in range(0, self.rows if self.columns else 0, step):
            yield range(start, min(start + step, self.rows))


def _rebuilt(sources: _Sources, tensor: _Tensor) -> Iterator[Tensor]:
    """The tensor's numbers as the expert has them, from the first on."""
    for matrix in range(tensor.matrices):
        skipped = Counter[str]()  # numbers of each result that earlier slices have had
        for rows in tensor.slices():
            yield _rebuilt_slice(sources, tensor, matrix, rows, skipped)


def _rebuilt_slice(sources: _Sources, tensor: _Tensor, matrix: int, rows: range, skipped: Counter[str]) -> Tensor:
    first, last = matrix * tensor.rows + rows.start, matrix * tensor.rows + rows.stop
    if tensor.transposed:
        first, last = matrix * tensor.columns, (matrix + 1) * tensor.columns  # rows of the stored tensor
    weights = [result for result, form in tensor.forms.items() if form.holds == "weights"]
    names = [tensor.stored(result, sources.expert) for result in weights]
    width = tensor.rows if tensor.transposed else tensor.columns
    several = [sources.base.read_rows(tensor.read, first, last)[:, :width]]  # of a longer vocabulary its beginning
    several += [sources.packed.read_rows(name, first, last) for name in names]
    stored = torch.stack([each.to(reduce(torch.promote_types, (one.dtype for one in several))) for each in several])
    values = stored.float()
    base, deltas = values[0], values[1:] - values[0]
    results = dict(zip(weights, deltas.transpose(1, 2) if tensor.transposed else deltas, strict=True))
    results |= _others(sources, tensor, matrix, rows, skipped)
    packing = ENTRIES[tensor.by].packing
    assert packing is not None, "it is a pack"
    delta = packing.unpack(**results).float()
    try:
        return restored(stored, base, deltas, delta.T if tensor.transposed else delta, torch_dtype(tensor.info))
    except OverflowError:
        raise CheckpointError(f"{tensor.name}: the rebuilt values overflow {tensor.info.dtype}") from None


def _others(sources: _Sources, tensor: _Tensor, matrix: int, rows: range, skipped: Counter[str]) -> dict[str, Tensor]:
    """The results of one slice that are no weights."""
    found: dict[str, Tensor] = {}
    for result, form in tensor.forms.items():
        name = tensor.stored(result, sources.expert)
        info = sources.packed.tensors[name]
        size = info.elements // tensor.matrices
        start = matrix * size + skipped[result]
        if form.holds == "bits":
            count = -(-len(rows) * tensor.columns // 8)
            found[result] = mask_of(sources.flat.read_rows(name, start, start + count), len(rows), tensor.columns)
            skipped[result] += count
        elif form.holds == "chosen":
            mask = found[form.at]
            count = int(mask.sum())
            found[result] = torch.zeros(mask.shape)
            found[result][mask] = sources.flat.read_rows(name, start, start + count).float().flatten()
            skipped[result] += count
        elif form.holds != "weights":
            numbers = sources.flat.read_rows(name, start, start + size).float()
            found[result] = numbers.view(info.shape if tensor.matrices == 1 else info.shape[1:])
    return found
