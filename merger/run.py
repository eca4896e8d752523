"""The loop: every tensor's slices are read, carried through the stages, and written; then the folder is named."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from merger._lazy import torch
from merger.checkpoint import manifest
from merger.checkpoint.hashes import digest, sha256
from merger.checkpoint.header import TORCH_NAMES
from merger.checkpoint.layout import layout
from merger.checkpoint.writer import Writer, check_output, write_json, write_text
from merger.copies import restored
from merger.errors import CheckpointError, RecipeError
from merger.machine import (
    SLICE,
    Machine,
    bytes_per_element,
    check_disk,
    check_place,
    peak_memory,
    slice_rows,
    tuned,
)
from merger.ops import Flow, Question
from merger.pipeline import Sizes, Slice, Subject, flow, run, settle
from merger.planning import ExtraRows, Part, Plan, TensorPlan
from merger.planning import plan as make_plan
from merger.recipe import Recipe
from merger.record import RECORD, decisive, record_of
from merger.statistics import Options, inputs_of, load, origin, sources
from merger.statistics import calibrate as statistics_files

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is to do as far as is known.

``merging`` counts bytes of input, ``calibrating NAME`` forward passes of a batch through a block.
"""


@dataclass(frozen=True)
class Result:
    """What a merge did."""

    output: str
    seconds: float
    bytes_read: int
    bytes_written: int
    tensors: dict[str, int]  # how many were merged, copied, dropped
    peak_memory_bytes: int
    device: str
    seed: int
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return asdict(self)


def merge(
    recipe: Recipe,
    *,
    device: str = "auto",
    max_memory: int | None = None,
    offline: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Result:
    """Merges what ``recipe`` says into a checkpoint folder, which appears whole or not at all.

    ``device`` is auto, cpu or cuda[:i]; ``max_memory`` caps host memory in bytes; ``force`` replaces
    an output that is there already. Raises a `MergerError` for whatever the user can mend.
    """
    began = time.monotonic()
    output = recipe.folder / Path(recipe.output.path).expanduser()
    check_output(output, recipe.folders(), beside=recipe.surroundings(), force=force)  # before any download
    plan = make_plan(recipe, offline=offline, headers_only=False)
    try:
        check_place(plan, output, force=force)
        check_disk(plan, output)
        machine = Machine.of(device, max_memory, plan)
        tell, say = progress or _silent, notice or _silent
        options = Options(machine.device, max_memory, trust_remote_code)
        paths = statistics_files(plan, options, notice=say, progress=tell) if plan.calibrated else {}
        return _Merge(plan, machine, output, paths, tell, say).run(began, force=force)
    finally:
        plan.close()


class Sink(Protocol):
    """What takes a merge's bytes, from several threads at once."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Takes ``data``, which stands from byte ``start`` of a tensor on."""

    def done(self, name: str, notes: Sequence[str]) -> None:
        """Hears that all bytes of a tensor were given, and what was noted about it."""


def recompute(
    plan: Plan,
    names: Set[str],
    sink: Sink,
    *,
    device: str = "auto",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Merges the tensors ``names`` of a plan again and gives their bytes to ``sink``, maybe others' too.

    Returns the SHA-256 of the statistics that were used, by expert.
    """
    machine = Machine.of(device, max_memory, plan)
    tell, say = progress or _silent, notice or _silent
    options = Options(machine.device, max_memory, trust_remote_code)
    paths = statistics_files(plan, options, notice=say, progress=tell) if plan.calibrated else {}
    merge = _Merge(plan, machine, plan.recipe.folder, paths, tell, say)
    merge.again(names, sink)
    return merge.statistics_origin


def calibrate(
    recipe: Recipe,
    *,
    to: Path | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> dict[str, Path]:
    """Makes the statistics of a recipe's experts, or finds them; with ``to`` copies them to a folder.

    Returns the file of each expert, as ``calibration: {stats: ...}`` of a recipe takes them.
    """
    plan = make_plan(recipe, offline=offline, headers_only=False)
    try:
        if not plan.calibrated:
            raise RecipeError("no stage of this recipe looks at layer inputs, so there is nothing to calibrate")
        options = Options(Machine.of(device, max_memory, plan).device, max_memory, trust_remote_code)
        paths = statistics_files(plan, options, notice=notice or _silent, progress=progress or _silent)
    finally:
        plan.close()
    if to is None:
        return paths
    to.mkdir(parents=True, exist_ok=True)
    copies = {name: to / f"{name}.stats.safetensors" for name in paths}
    for name, path in paths.items():
        shutil.copyfile(path, copies[name])
    return copies


# --- the merge ------------------------------------------------------------------------------------


class _Merge:
    """One run: its plan, its workers, its writer."""

    def __init__(
        self,
        plan: Plan,
        machine: Machine,
        output: Path,
        statistics: Mapping[str, Path],
        progress: Progress,
        notice: Callable[[str], None],
    ) -> None:
        self.plan = plan
        self.machine = machine
        self.output = output
        self.tell = progress
        self.notes = list(plan.notes)
        self.remarks: dict[str, list[str]] = {tensor.name: [] for tensor in plan.tensors}
        self.notice = notice
        self.statistics = load(plan, statistics)
        self.statistics_origin = origin(statistics)
        self.work = [(tensor, part) for tensor in plan.tensors for part in tensor.parts]
        self.sizes: Counter[int] = Counter()
        for tensor, part in self.work:
            self.sizes[tensor.group] += part.rows * part.columns if tensor.stages else 0
        self.twins = {tensor.tied_to: tensor.name for tensor in plan.tensors if tensor.tied_to is not None}
        self.left = Counter(tensor.name for tensor, _ in self.work)
        self.lock = Lock()
        self.done_bytes, self.total_bytes = 0, plan.bytes_read

    def run(self, began: float, *, force: bool) -> Result:
        infos = {tensor.name: tensor.info for tensor in self.plan.tensors}
        shards = layout(list(infos.items()), self.plan.recipe.output.shard_size)
        for note in self.notes:
            self.notice(note)
        writer = Writer(self.output, shards, infos, decisive(self.plan, self.machine.device, self.statistics_origin))
        try:
            writer.open(force=force, tell=partial(self.tell, "checking"))
            unfinished = writer.unfinished
            self._resume(writer, len(shards))
            with ThreadPoolExecutor(1, "merger-input") as hashing:
                inputs = self._hash_inputs(hashing)
                try:
                    self._carry_out(writer)
                    self._write_side_files(writer, inputs)
                except BaseException:
                    hashing.shutdown(wait=False, cancel_futures=True)
                    raise
            written = sum(infos[name].nbytes for name in unfinished)
            writer.finish(force=force)
        except (RecipeError, CheckpointError):
            writer.abandon()
            raise
        except BaseException:
            if writer.suspend():
                self.notice(f"{writer.journal.folder} keeps the finished shards; the same run goes on from there")
            raise
        return self._result(began, written)

    def _resume(self, writer: Writer, shards: int) -> None:
        """Leaves out what an earlier run has finished, and remembers what was noted then."""
        finished = writer.journal.finished
        if finished:
            self.notice(f"goes on where an earlier run stopped: {len(finished)} of {shards} shards are finished")
        self.notes += dict.fromkeys(note for each in finished.values() for note in each.notes)
        self._only(writer.unfinished)

    def again(self, names: Set[str], sink: Sink) -> None:
        """Carries out what makes the tensors ``names``; ``sink`` may be given others too."""
        self._only(names)
        self._carry_out(sink)

    def _only(self, names: Set[str]) -> None:
        """Leaves out what neither makes the tensors ``names`` nor is ranked together with them."""
        wanted = [tensor for tensor in self.plan.tensors if not names.isdisjoint(self._names(tensor))]
        ranked = {tensor.group for tensor in wanted if tensor.ranked}
        needed = {tensor.name for tensor in wanted}
        needed |= {tensor.name for tensor in self.plan.tensors if tensor.ranked and tensor.group in ranked}
        self.work = [(tensor, part) for tensor, part in self.work if tensor.name in needed]
        self.total_bytes = replace(
            self.plan, tensors=tuple(tensor for tensor in self.plan.tensors if tensor.name in needed)
        ).bytes_read

    def _carry_out(self, sink: Sink) -> None:
        """Sends every tensor through its stages, several side by side."""
        self.sink = sink
        with (
            tuned(),
            ThreadPoolExecutor(self.machine.workers, "merger-slice") as self.slices,
            ThreadPoolExecutor(self.machine.in_flight, "merger-tensor") as tensors,
        ):
            try:
                settle([t.group for t, _ in self.work], self._visit, partial(_map, tensors))
            except BaseException:
                for pool in (tensors, self.slices):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise

    # --- one tensor ---

    def _visit(self, i: int, known: Sequence[Any]) -> Question | None:
        tensor, part = self.work[i]
        size = self.plan.bytes_of(tensor, part.rows * part.columns)
        question = self._merge(tensor, part, known) if tensor.stages else None
        if not tensor.stages:
            self._copy(tensor, part)
        self._count(size, again=question is not None)
        with self.lock:
            self.left[tensor.name] -= question is None
            whole = self.left[tensor.name] == 0
        if whole:
            for rows in tensor.extra:
                self._extra_rows(tensor, rows)
                self._count(self.plan.bytes_of_rows(tensor, rows))
            for name in self._names(tensor):
                self.sink.done(name, self.remarks[tensor.name])
        return question

    def _count(self, size: int, *, again: bool = False) -> None:
        """Tells of bytes that were read; what will be read ``again`` is more to do."""
        with self.lock:
            self.done_bytes += size
            self.total_bytes += size if again else 0
            self.tell("merging", self.done_bytes, self.total_bytes)

    def _merge(self, tensor: TensorPlan, part: Part, known: Sequence[Any]) -> Question | None:
        subject = Subject(
            name=tensor.name,
            kind=tensor.kind,
            place=tensor.place,
            rows=part.rows,
            columns=part.columns,
            seed=self.plan.recipe.seed,
            first=part.row * part.columns,
            transposed=part.transposed,
            inputs=inputs_of(tensor, part, self.statistics, self.machine.device, partial(self._note, tensor)),
        )
        step = slice_rows(tensor, part)
        count = -(-part.rows // step) if part.columns else 0
        elements = part.rows * part.columns
        hold = count == 1 or elements * bytes_per_element(len(self.plan.models) - 1) <= self.machine.hold

        def carry(j: int) -> Flow[None]:
            rows = range(j * step, min((j + 1) * step, part.rows))
            stored, piece = self._read(tensor, part, rows)
            delta = yield from flow(tensor.stages, piece, subject)
            self._put(tensor, part, stored, piece, delta)

        sizes = Sizes(elements, self.sizes[tensor.group])
        return run(count, carry, sizes=sizes, known=known, hold=hold, mapper=partial(_map, self.slices))

    def _read(self, tensor: TensorPlan, part: Part, rows: range) -> tuple[Tensor, Slice]:
        """Some rows of a part: base and experts as stored, [1+k r c], and the slice that its stages see."""
        first, last = part.row + rows.start, part.row + rows.stop
        if part.transposed:
            first, last = part.row, part.row + part.columns  # rows of the stored tensor are its columns
        models = [(self.plan.models[label], tensor.reads[label]) for label in ("base", *tensor.place.experts)]
        dtypes = [model.dtype(name) for model, name in models if name is not None]
        shape = len(models), last - first, part.rows if part.transposed else part.columns
        stored = torch.empty(shape, dtype=reduce(torch.promote_types, dtypes))
        changes = {}
        for k, (model, name) in enumerate(models):
            change = None if name is None else model.change_rows(name, first, last)
            if name is None:  # `missing: zero`
                stored[k] = stored[0]
            elif change is not None:
                changes[k] = change
                torch.add(stored[0], change, out=stored[k])
            elif len(tensor.info.shape) == 1 and model.tensors[name].elements > part.columns:  # a longer vocabulary
                stored[k] = model.read_rows(name, first, last)[:, : part.columns]
            else:
                model.read_into(stored[k], name, first, last)
        stored = stored.to(self.machine.device)
        values = stored.to(torch.float32, copy=True)
        base, deltas = values[0], values[1:].sub_(values[0])
        for k, change in changes.items():
            deltas[k - 1] = change
        self._check_finite(tensor, base, deltas)
        if part.transposed:
            base, deltas = base.T, deltas.transpose(1, 2)
        return stored, Slice(rows.start, base, deltas)

    def _check_finite(self, tensor: TensorPlan, base: Tensor, deltas: Tensor) -> None:
        """CheckpointError that names the model if any value is NaN or infinite."""
        if math.isfinite(deltas.sum()):
            return
        if not torch.isfinite(base).all():
            raise CheckpointError(f"base: {tensor.reads['base']} holds NaN or infinity")
        for k, label in enumerate(tensor.place.experts):
            if not torch.isfinite(deltas[k]).all():
                raise CheckpointError(f"{label}: {tensor.reads[label]} holds NaN or infinity")

    def _put(self, tensor: TensorPlan, part: Part, stored: Tensor, piece: Slice, delta: Tensor) -> None:
        """Rounds once to the output's dtype and writes; what equals an input keeps that input's bits."""
        dtype = getattr(torch, TORCH_NAMES[tensor.info.dtype])
        base, deltas, row = piece.base, piece.deltas, part.row + piece.row
        if part.transposed:
            base, deltas, delta, row = base.T, deltas.transpose(1, 2), delta.T, part.row
        merged = restored(stored, base, deltas, delta, dtype)
        if not math.isfinite(merged.sum()) and not torch.isfinite(merged).all():
            raise _overflow(tensor)
        self._write(tensor, row, merged)

    def _write(self, tensor: TensorPlan, row: int, values: Tensor) -> None:
        data = values.contiguous().cpu().flatten().view(torch.uint8).numpy().data
        width = values.shape[-1] * values.element_size()
        for name in self._names(tensor):
            self.sink.write(name, row * width, data)

    def _names(self, tensor: TensorPlan) -> list[str]:
        """The names under which a tensor is written: its own, and that of a head that repeats it."""
        return [tensor.name, *(twin for of, twin in self.twins.items() if of == tensor.name)]

    def _copy(self, tensor: TensorPlan, part: Part) -> None:
        """Copies a tensor slice by slice; a buffer that differs between models is told of."""
        dtype = getattr(torch, TORCH_NAMES[tensor.info.dtype])
        step = slice_rows(tensor, part)
        source = tensor.reads[tensor.source]
        assert source is not None
        others = {label: read for label, read in tensor.reads.items() if label != tensor.source and read}
        differing = set()
        for start in range(0, part.rows if part.columns else 0, step):
            stop = min(start + step, part.rows)
            values = self.plan.models[tensor.source].read_rows(source, start, stop)
            for label, read in others.items():
                same = (
                    self.plan.models[label].tensors[read].shape == self.plan.models[tensor.source].tensors[source].shape
                )
                if not same or not torch.equal(values, self.plan.models[label].read_rows(read, start, stop)):
                    differing.add(label)
            self._write(tensor, start, _rounded(values, dtype, tensor))
        if differing:
            self._note(
                tensor, f"{tensor.name}: copied from {tensor.source}, but differs in {', '.join(sorted(differing))}"
            )

    def _extra_rows(self, tensor: TensorPlan, rows: ExtraRows) -> None:
        """Vocabulary rows that not all models have: the mean of those that have them."""
        dtype = getattr(torch, TORCH_NAMES[tensor.info.dtype])
        having = [(self.plan.models[label], tensor.reads[label]) for label in rows.models]
        vector = len(tensor.info.shape) == 1
        step = SLICE if vector else max(1, SLICE // max(1, tensor.info.matrix[1]))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            several = [
                model.read(name)[start:stop].unsqueeze(1) if vector else model.read_rows(name, start, stop)
                for model, name in having
                if name is not None
            ]
            for label, each in zip(rows.models, several, strict=True):
                if not torch.isfinite(each).all():
                    raise CheckpointError(f"{label}: {tensor.reads[label]} holds NaN or infinity")
            mean = several[0] if len(several) == 1 else torch.stack([each.double() for each in several]).mean(0)
            self._write(tensor, start, _rounded(mean, dtype, tensor))

    def _note(self, tensor: TensorPlan, message: str) -> None:
        """Remarks on a tensor, once however often it is visited."""
        with self.lock:
            heard = message in self.remarks[tensor.name]
            self.remarks[tensor.name] += [] if heard else [message]
            self.notes += [] if message in self.notes else [message]
        if not heard:
            self.notice(message)

    # --- what stands beside the weights ---

    def _hash_inputs(self, pool: Executor) -> dict[Path, Future[str]]:
        """Begins to hash every weight file; those of the Hub's cache are named by their hash already."""
        files = {file for model in self.plan.models.values() for file in model.files}
        return {file: pool.submit(sha256, file) for file in sorted(files)}

    def _write_side_files(self, writer: Writer, hashes: Mapping[Path, Future[str]]) -> None:
        plan, folder = self.plan, writer.folder
        copied = manifest.side_files(plan.base.directory, plan.models[plan.tokenizer].directory)
        manifest.copy_side_files(copied, folder)
        write_json(folder / "config.json", plan.config)
        files = {name: digest(folder / name) for name in sorted({"config.json", *copied})}
        record = record_of(
            plan,
            self.machine.device,
            hashes,
            writer.digests(),
            files,
            sources(plan),
            self.statistics_origin,
            self.notes,
        )
        write_json(folder / RECORD, record)
        models = [each["source"] for each in record["inputs"].values()]
        write_text(folder / "README.md", manifest.card(self.output.name, models, record["recipe"], self._counts()))

    def _counts(self) -> dict[str, int]:
        counts = Counter("merged" if tensor.stages else "copied" for tensor in self.plan.tensors)
        dropped = sum(len(names) for names in self.plan.dropped.values())
        return {"merged": counts["merged"], "copied": counts["copied"], "dropped": dropped}

    def _result(self, began: float, written: int) -> Result:
        return Result(
            output=str(self.output),
            seconds=round(time.monotonic() - began, 3),
            bytes_read=self.done_bytes,
            bytes_written=written,
            tensors=self._counts(),
            peak_memory_bytes=peak_memory(),
            device=self.machine.device,
            seed=self.plan.recipe.seed,
            notes=self.notes,
        )


def _rounded(values: Tensor, dtype: torch.dtype, tensor: TensorPlan) -> Tensor:
    """``values`` in another dtype, which must hold them if theirs did."""
    rounded = values.to(dtype)
    if dtype != values.dtype and not torch.equal(torch.isfinite(rounded), torch.isfinite(values)):
        raise _overflow(tensor)
    return rounded


def _overflow(tensor: TensorPlan) -> CheckpointError:
    return CheckpointError(
        f"{tensor.name}: the merged values overflow {tensor.info.dtype}; lower lambda or the weights, "
        "or set output.dtype: float32"
    )


def _silent(*_: object) -> None:
    """Tells nobody."""


def _map(pool: ThreadPoolExecutor, function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    return pool.map(function, numbers)
