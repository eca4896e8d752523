"""One expert of a packed output as a checkpoint of its own; docs/experts.md has the layout."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import reduce
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint import side_files
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.files import write_text
from merger.checkpoint.layout import layout
from merger.checkpoint.opening import open_checkpoint
from merger.checkpoint.placement import check_output
from merger.checkpoint.tensor_info import Info, torch_dtype
from merger.checkpoint.writer import Writer
from merger.engine.machine import tuned
from merger.engine.manifest import RECORD, Manifest
from merger.engine.memory import SLICE
from merger.engine.recorded_recipe import base_source, changed_file
from merger.errors import CheckpointError, RecipeError, checkpoint_faults, nearest
from merger.ops.rounding import restored
from merger.options import Progress, RunOptions
from merger.pipeline.registry import ENTRIES
from merger.planning.packed import Packed, as_columns, mask_of, open_packed

if TYPE_CHECKING:
    from torch import Tensor


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
    options: RunOptions = RunOptions(),
    *,
    base: str | None = None,
    force: bool = False,
) -> Extraction:
    """Writes one expert of a packed output as a checkpoint, which appears whole or not at all.

    It is rebuilt from the packed files and the base they were made with: ``base`` where that is no longer where the
    manifest says. Raises a `MergerError` for whatever the user can mend.
    """
    began = time.monotonic()
    source, target = Path(folder), Path(output)
    manifest = _manifest(source, expert)
    with (
        closing(open_packed(source)) as packed,
        closing(as_columns(packed)) as flat,
        closing(_base(source, manifest, base, options.offline)) as model,
    ):
        check_output(target, [packed.directory, model.directory], force=force)
        sources = _Sources(expert, packed, flat, model)
        tensors = list(_tensors(manifest, packed))
        infos = {tensor.name: tensor.info for tensor in tensors}
        shards = layout(list(infos.items()), manifest.recipe["output"]["shard_size"])
        writer = Writer(target, shards, infos, {"expert": expert, "packed": _digest(source)})
        try:
            writer.open(force=force)
            with checkpoint_faults(f"{source}: {expert} cannot be rebuilt from its files as {RECORD} says"):
                _write(sources, tensors, writer, options.progress)
            _write_side_files(source, target.name, expert, manifest, writer.folder)
            writer.digests()
            writer.finish(force=force)
        except BaseException:
            writer.abandon()
            raise
    size = sum(info.nbytes for info in infos.values())
    return Extraction(str(target), expert, round(time.monotonic() - began, 3), size)


# --- what it is made of ---------------------------------------------------------------------------


def _manifest(folder: Path, expert: str) -> Manifest:
    """The manifest of an output that holds this expert."""
    manifest = Manifest.read(folder)
    if not manifest.is_packed:
        raise CheckpointError(f"{folder}: is one model, not several experts; there is nothing to extract")
    if expert not in manifest.experts:
        raise RecipeError(f"{folder}: holds no expert {expert!r}; {nearest(expert, manifest.experts)}")
    return manifest


def _base(folder: Path, manifest: Manifest, given: str | None, offline: bool) -> Checkpoint:
    """The base that the experts were packed against; CheckpointError if it is gone, or another one by now."""
    said = base_source(manifest, folder, given)
    model = open_checkpoint(said["model"], said.get("adapter"), label="base", folder=Path.cwd(), offline=offline)
    if (wrong := changed_file(manifest, "base", model)) is not None:
        model.close()
        raise CheckpointError(f"{wrong}, and no expert can be rebuilt on another; --base says where it is")
    return model


def _tensors(manifest: Manifest, packed: Checkpoint) -> Iterator[_Tensor]:
    """All tensors of the expert, and what they are made of."""
    if unrecorded := packed.tensors.keys() - manifest.stored_tensors.keys():
        raise CheckpointError(f"{packed.directory}: {min(unrecorded)} is not in {RECORD}; verify it")
    fates = manifest.tensors
    for name, said in fates.items():
        of = said.get("tied to", name)
        how = fates[of].get("packed")
        made = None if how is None else Packed.of(of, manifest.experts, how)
        stored = {name: packed.tensors.get(name)} if made is None else made.infos
        if made is not None:
            _unpack(made)  # is there, which is to be known before anything is written
        for each, info in stored.items():
            there = packed.tensors.get(each)
            if there is None or info is None or (there.dtype, there.shape) != (info.dtype, info.shape):
                raise CheckpointError(f"{packed.directory}: {each} is not there as merger.json says; verify it")
        read = fates[of].get("reads", {}).get("base", of)
        yield _Tensor(name, packed.tensors[name] if made is None else made.info, read, made)


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()


def _write(sources: _Sources, tensors: Sequence[_Tensor], writer: Writer, tell: Progress) -> None:
    done, total = 0, sum(tensor.info.nbytes for tensor in tensors)
    with tuned():
        for tensor in tensors:
            position = 0
            for values in _values(sources, tensor):
                data = values.contiguous().flatten().view(torch.uint8).numpy().data
                writer.write(tensor.name, position, data)
                position += len(data)
                done += len(data)
                tell("extracting", done, total)
            writer.done(tensor.name)


def _values(sources: _Sources, tensor: _Tensor) -> Iterator[Tensor]:
    if tensor.packed is None:
        return _copied(sources.packed, tensor.name)
    return _rebuilt(sources, tensor.packed, tensor.read)


def _copied(packed: Checkpoint, name: str) -> Iterator[Tensor]:
    """A tensor that all experts share, as it lies in the files."""
    rows, columns = packed.tensors[name].matrix
    step = max(1, SLICE // max(1, columns))
    for start in range(0, rows if columns else 0, step):
        yield packed.read_rows(name, start, min(start + step, rows))


def _write_side_files(source: Path, title: str, expert: str, manifest: Manifest, folder: Path) -> None:
    """Config, tokenizer and the rest as they lie beside the packed files, and a card."""
    names = (name for name in manifest.files if side_files.is_inside(name))
    side_files.write_side_files({name: source / name for name in names}, folder)
    base = manifest.inputs["base"]["source"]
    write_text(folder / "README.md", side_files.extracted_card(title, base, expert, source.name))


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
    """One tensor of the expert."""

    name: str
    info: Info
    read: str  # what it is called in the base
    packed: Packed | None  # what it is rebuilt of; None where all experts have it as it lies in the files


def _slices(packed: Packed) -> Iterator[range]:
    """Rows of a matrix that are rebuilt together: all where another orientation or factors need them."""
    whole = packed.transposed or any(form.holds == "factors" for form in packed.forms.values())
    unit = 8 // math.gcd(8, packed.columns)  # so that bits begin with a byte
    step = packed.rows if whole else max(1, SLICE // max(1, packed.columns * unit)) * unit
    for start in range(0, packed.rows if packed.columns else 0, step):
        yield range(start, min(start + step, packed.rows))


def _rebuilt(sources: _Sources, packed: Packed, read: str) -> Iterator[Tensor]:
    """A tensor's numbers as the expert has them, from the first on; it is called ``read`` in the base."""
    for matrix in range(packed.matrices):
        skipped = Counter[str]()  # numbers of each result that earlier slices have had
        for rows in _slices(packed):
            yield _rebuilt_slice(sources, packed, read, matrix, rows, skipped)


def _rebuilt_slice(
    sources: _Sources, packed: Packed, read: str, matrix: int, rows: range, skipped: Counter[str]
) -> Tensor:
    first, last = matrix * packed.rows + rows.start, matrix * packed.rows + rows.stop
    if packed.transposed:
        first, last = matrix * packed.columns, (matrix + 1) * packed.columns  # rows of the stored tensor
    weights = [result for result, form in packed.forms.items() if form.holds == "weights"]
    names = [packed.stored_name(result, sources.expert) for result in weights]
    width = packed.rows if packed.transposed else packed.columns
    several = [sources.base.read_rows(read, first, last)[:, :width]]  # of a longer vocabulary its beginning
    several += [sources.packed.read_rows(name, first, last) for name in names]
    stored = torch.stack([each.to(reduce(torch.promote_types, (one.dtype for one in several))) for each in several])
    values = stored.float()
    base, deltas = values[0], values[1:] - values[0]
    results = dict(zip(weights, deltas.transpose(1, 2) if packed.transposed else deltas, strict=True))
    results |= _others(sources, packed, matrix, rows, skipped)
    delta = _unpack(packed)(**results).float()
    try:
        return restored(stored, base, deltas, delta.T if packed.transposed else delta, torch_dtype(packed.info))
    except OverflowError:
        raise CheckpointError(f"{packed.name}: the rebuilt values overflow {packed.info.dtype}") from None


def _unpack(packed: Packed) -> Callable[..., Tensor]:
    """What makes a task vector of one expert's results; CheckpointError where no pack of that name takes these."""
    entry = ENTRIES.get(packed.by)
    if entry is None or entry.packing is None or {*signature(entry.packing.unpack).parameters} != packed.forms.keys():
        raise CheckpointError(f"{packed.name}: was packed by {packed.by!r} in a way that this version does not know")
    return entry.packing.unpack


def _others(sources: _Sources, packed: Packed, matrix: int, rows: range, skipped: Counter[str]) -> dict[str, Tensor]:
    """The results of one slice that are no weights."""
    found: dict[str, Tensor] = {}
    for result, form in packed.forms.items():
        name = packed.stored_name(result, sources.expert)
        size = packed.infos[name].elements // packed.matrices
        start = matrix * size + skipped[result]
        if form.holds == "bits":
            count = -(-len(rows) * packed.columns // 8)
            found[result] = mask_of(sources.flat.read_rows(name, start, start + count), len(rows), packed.columns)
            skipped[result] += count
        elif form.holds == "chosen":
            mask = found[form.at]
            count = int(mask.sum())
            found[result] = torch.zeros(mask.shape)
            found[result][mask] = sources.flat.read_rows(name, start, start + count).float().flatten()
            skipped[result] += count
        elif form.holds != "weights":
            numbers = sources.flat.read_rows(name, start, start + size).float()
            found[result] = numbers.view(form.shape)
    return found
