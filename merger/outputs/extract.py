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
from merger.options import Progress, RunOptions, check_options, path_argument
from merger.pipeline.registry import ENTRIES
from merger.planning.packed import Packed, as_columns, mask_of, open_packed
from merger.recipe.input_locations import check_models

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Extraction:
    """The result of `extract`."""

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

    The expert is rebuilt from the packed files and their base; ``base`` is the place of a base that has moved since
    the merge. Raises a `MergerError` for every fault that the user can mend.
    """
    began = time.monotonic()
    check_options(options)
    source, target = path_argument("folder", folder), path_argument("output", output)
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


# --- inputs ---------------------------------------------------------------------------------------


def _manifest(folder: Path, expert: str) -> Manifest:
    """Reads the manifest of an output; raises RecipeError if the output does not hold the expert."""
    manifest = Manifest.read(folder)
    if not manifest.is_packed:
        raise CheckpointError(f"{folder}: is one model, not several experts; there is nothing to extract")
    if expert not in manifest.experts:
        raise RecipeError(f"{folder}: holds no expert {expert!r}; {nearest(expert, manifest.experts)}")
    return manifest


def _base(folder: Path, manifest: Manifest, path: str | None, offline: bool) -> Checkpoint:
    """Opens the base of the packed experts; raises CheckpointError if it is missing or has changed."""
    if path is not None:
        check_models({"base": path})
    source = base_source(manifest, folder, path)
    model = open_checkpoint(
        source["model"],
        source.get("adapter"),
        label="base",
        folder=Path.cwd(),
        offline=offline,
        rename=source.get("rename", {}),
    )
    if (fault := changed_file(manifest, "base", model)) is not None:
        model.close()
        raise CheckpointError(f"{fault}, and no expert can be rebuilt on another; base=MODEL says where it is")
    return model


def _tensors(manifest: Manifest, packed: Checkpoint) -> Iterator[_Tensor]:
    """Yields all tensors of the expert with the packed tensors that they are rebuilt from."""
    if unrecorded := packed.tensors.keys() - manifest.stored_tensors.keys():
        raise CheckpointError(f"{packed.directory}: {min(unrecorded)} is not in {RECORD}; verify it")
    records = manifest.tensors
    for name, record in records.items():
        owner = record.get("tied to", name)
        packing = records[owner].get("packed")
        packed_tensor = None if packing is None else Packed.of(owner, manifest.experts, packing)
        stored = {name: packed.tensors.get(name)} if packed_tensor is None else packed_tensor.infos
        if packed_tensor is not None:
            _unpack(packed_tensor)  # raises before the first write if the pack is unknown
        for stored_name, info in stored.items():
            stored_info = packed.tensors.get(stored_name)
            if (
                stored_info is None
                or info is None
                or (stored_info.dtype, stored_info.shape) != (info.dtype, info.shape)
            ):
                raise CheckpointError(f"{packed.directory}: {stored_name} is not there as merger.json says; verify it")
        base_name = records[owner].get("reads", {}).get("base", owner)
        yield _Tensor(
            name, packed.tensors[name] if packed_tensor is None else packed_tensor.info, base_name, packed_tensor
        )


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()


def _write(sources: _Sources, tensors: Sequence[_Tensor], writer: Writer, tell: Progress) -> None:
    bytes_written, total = 0, sum(tensor.info.nbytes for tensor in tensors)
    with tuned():
        for tensor in tensors:
            position = 0
            for values in _values(sources, tensor):
                data = values.contiguous().flatten().view(torch.uint8).numpy().data
                writer.write(tensor.name, position, data)
                position += len(data)
                bytes_written += len(data)
                tell("extracting", bytes_written, total)
            writer.finish_tensor(tensor.name)


def _values(sources: _Sources, tensor: _Tensor) -> Iterator[Tensor]:
    if tensor.packed is None:
        return _read_slices(sources.packed, tensor.name)
    return _rebuild(sources, tensor.packed, tensor.read)


def _read_slices(packed: Checkpoint, name: str) -> Iterator[Tensor]:
    """Yields slices of a tensor that all experts share."""
    rows, columns = packed.tensors[name].matrix
    step = max(1, SLICE // max(1, columns))
    for start in range(0, rows if columns else 0, step):
        yield packed.read_rows(name, start, min(start + step, rows))


def _write_side_files(source: Path, title: str, expert: str, manifest: Manifest, folder: Path) -> None:
    """Copies config, tokenizer and the other side files of the packed output, and writes a card."""
    names = (name for name in manifest.files if side_files.is_inside(name))
    side_files.write_side_files({name: source / name for name in names}, folder)
    base = manifest.inputs["base"]["source"]
    write_text(folder / "README.md", side_files.extracted_card(title, base, expert, source.name))


# --- one tensor -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sources:
    """The open checkpoints that an expert is rebuilt from."""

    expert: str
    packed: Checkpoint
    flat: Checkpoint  # the packed tensors, each as one column of numbers
    base: Checkpoint


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the expert."""

    name: str
    info: Info
    read: str  # its name in the base
    packed: Packed | None  # None for a tensor that all experts share


def _slices(packed: Packed) -> Iterator[range]:
    """Yields the row ranges that are rebuilt together: all rows of a transposed or factored matrix."""
    is_single_slice = packed.transposed or any(form.holds == "factors" for form in packed.forms.values())
    unit = 8 // math.gcd(8, packed.columns)  # so that bits begin with a byte
    step = packed.rows if is_single_slice else max(1, SLICE // max(1, packed.columns * unit)) * unit
    for start in range(0, packed.rows if packed.columns else 0, step):
        yield range(start, min(start + step, packed.rows))


def _rebuild(sources: _Sources, packed: Packed, read: str) -> Iterator[Tensor]:
    """Yields an expert's values of a tensor in order; ``read`` is the tensor's name in the base."""
    for matrix in range(packed.matrices):
        skipped = Counter[str]()  # numbers of each result that earlier slices have had
        for rows in _slices(packed):
            yield _rebuild_slice(sources, packed, read, matrix, rows, skipped)


def _rebuild_slice(
    sources: _Sources, packed: Packed, read: str, matrix: int, rows: range, skipped: Counter[str]
) -> Tensor:
    first, last = matrix * packed.rows + rows.start, matrix * packed.rows + rows.stop
    if packed.transposed:
        first, last = matrix * packed.columns, (matrix + 1) * packed.columns  # rows of the stored tensor
    weights = [result for result, form in packed.forms.items() if form.holds == "weights"]
    names = [packed.stored_name(result, sources.expert) for result in weights]
    width = packed.rows if packed.transposed else packed.columns
    tensors = [sources.base.read_rows(read, first, last)[:, :width]]  # of a longer vocabulary its beginning
    tensors += [sources.packed.read_rows(name, first, last) for name in names]
    stored = torch.stack(
        [tensor.to(reduce(torch.promote_types, (tensor.dtype for tensor in tensors))) for tensor in tensors]
    )
    values = stored.float()
    base, deltas = values[0], values[1:] - values[0]
    results = dict(zip(weights, deltas.transpose(1, 2) if packed.transposed else deltas, strict=True))
    results |= _packed_results(sources, packed, matrix, rows, skipped)
    delta = _unpack(packed)(**results).float()
    try:
        return restored(stored, base, deltas, delta.T if packed.transposed else delta, torch_dtype(packed.info))
    except OverflowError:
        raise CheckpointError(f"{packed.name}: the rebuilt values overflow {packed.info.dtype}") from None


def _unpack(packed: Packed) -> Callable[..., Tensor]:
    """Returns the function that rebuilds a task vector; raises CheckpointError for an unknown pack or its results."""
    entry = ENTRIES.get(packed.by)
    if entry is None or entry.packing is None or {*signature(entry.packing.unpack).parameters} != packed.forms.keys():
        raise CheckpointError(f"{packed.name}: was packed by {packed.by!r} in a way that this version does not know")
    return entry.packing.unpack


def _packed_results(
    sources: _Sources, packed: Packed, matrix: int, rows: range, skipped: Counter[str]
) -> dict[str, Tensor]:
    """Reads the results of one slice, except weights: bits, selected values, factors and scalars."""
    results: dict[str, Tensor] = {}
    for result, form in packed.forms.items():
        name = packed.stored_name(result, sources.expert)
        size = packed.infos[name].elements // packed.matrices
        start = matrix * size + skipped[result]
        if form.holds == "bits":
            count = -(-len(rows) * packed.columns // 8)
            results[result] = mask_of(sources.flat.read_rows(name, start, start + count), len(rows), packed.columns)
            skipped[result] += count
        elif form.holds == "chosen":
            mask = results[form.at]
            count = int(mask.sum())
            results[result] = torch.zeros(mask.shape)
            results[result][mask] = sources.flat.read_rows(name, start, start + count).float().flatten()
            skipped[result] += count
        elif form.holds != "weights":
            numbers = sources.flat.read_rows(name, start, start + size).float()
            results[result] = numbers.view(form.shape)
    return results
