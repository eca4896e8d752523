"""The loop: every tensor's slices are read, carried through the stages, and written; then the folder is named."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from merger._lazy import torch
from merger.checkpoint import manifest
from merger.checkpoint.hashes import sha256
from merger.checkpoint.header import TORCH_NAMES
from merger.checkpoint.layout import layout
from merger.checkpoint.stored import PACKED, SINGLE
from merger.checkpoint.writer import Writer, check_output, json_bytes, write_bytes, write_json, write_text
from merger.errors import CheckpointError, RecipeError, UnreadableError
from merger.machine import (
    SLICE,
    Machine,
    check_disk,
    check_place,
    peak_memory,
    slice_rows,
    tuned,
)
from merger.ops import Flow, Max, Sum
from merger.packing import Packed, pieces
from merger.passes import Ahead, settle
from merger.pipeline import Slice, Subject, flow
from merger.planning import ExtraRows, Part, Plan, TensorPlan
from merger.planning import plan as make_plan
from merger.reading import Reader, rounded
from merger.recipe import Recipe
from merger.record import RECORD, decisive, record_of
from merger.statistics import Merged, Options, Statistics, grams, keep_grams, load, origin, sources
from merger.statistics import calibrate as statistics_files

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is to do as far as is known.

``merging`` counts bytes of input, ``calibrating NAME`` forward passes of a batch through a block.
"""


Block = tuple[list[TensorPlan], Mapping[str, Statistics]]
Blocks = Callable[[Merged], Iterable[Block]]
"""Tensors that take Gram matrices, and these, as `grams` gives them to who can tell what is merged already."""


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
        options = Options(machine.device, machine.hidden, trust_remote_code)
        paths = statistics_files(plan, options, notice=say, progress=tell) if plan.needs_statistics else {}
        blocks = partial(grams, plan, options, notice=say, progress=tell)
        return _Merge(plan, machine, output, paths, blocks, tell, say).run(began, force=force)
    finally:
        plan.close()


class Sink(Protocol):
    """What takes a merge's bytes, from several threads at once."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Takes ``data``, which stands from byte ``start`` of a tensor on."""

    def done(self, name: str, notes: Sequence[str]) -> None:
        """Hears that all bytes of a tensor were given, and what was noted about it."""

    def read(self, name: str) -> Tensor | None:
        """Gives back a tensor that is whole, or None."""


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
    options = Options(machine.device, machine.hidden, trust_remote_code)
    paths = statistics_files(plan, options, notice=say, progress=tell) if plan.needs_statistics else {}
    blocks = partial(grams, plan, options, notice=say, progress=tell)
    carry_out(plan, machine, names, sink, paths, blocks, progress=tell, notice=say)
    return origin(paths)


def carry_out(
    plan: Plan,
    machine: Machine,
    names: Set[str],
    sink: Sink,
    statistics: Mapping[str, Path],
    blocks: Blocks,
    *,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> None:
    """Merges the tensors ``names`` of a plan into ``sink``, given the statistics files and Gram matrices it needs."""
    merge = _Merge(plan, machine, plan.recipe.folder, statistics, blocks, progress or _silent, notice or _silent)
    merge.again(names, sink)


def calibrate(
    recipe: Recipe,
    *,
    to: Path | None = None,
    gram: bool = False,
    device: str = "auto",
    max_memory: int | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> dict[str, Path]:
    """Makes the statistics of a recipe's experts, or finds them; with ``to`` copies them to a folder.

    With ``gram`` they hold Gram matrices, as large as the models, and are made in ``to`` itself, where an
    unfinished one is gone on with. Returns the file or folder of each expert, as ``calibration: {stats: ...}`` of
    a recipe takes them.
    """
    plan = make_plan(recipe, offline=offline, headers_only=False)
    try:
        machine = Machine.of(device, max_memory, plan)
        options = Options(machine.device, machine.hidden, trust_remote_code)
        if gram:
            _check_grams(plan)
            return keep_grams(plan, options, to, notice=notice or _silent, progress=progress or _silent)
        if not plan.needs_statistics:
            raise RecipeError(
                "no stage of this recipe needs statistics that are kept: there is nothing to calibrate"
                + (" (--gram keeps Gram matrices)" if any(tensor.gram for tensor in plan.tensors) else "")
            )
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


def _check_grams(plan: Plan) -> None:
    """RecipeError if the recipe needs no Gram matrices, or none that can be made beforehand."""
    if not any(tensor.gram for tensor in plan.tensors):
        raise RecipeError("no stage of this recipe takes Gram matrices: there is nothing to keep with --gram")
    if any(tensor.fed_by_merged for tensor in plan.tensors):
        raise RecipeError("inputs: merged makes Gram matrices while it merges: there is nothing to keep with --gram")


# --- the merge ------------------------------------------------------------------------------------


class _Merge:
    """One run: its plan, its workers, its writer."""

    def __init__(
        self,
        plan: Plan,
        machine: Machine,
        output: Path,
        statistics: Mapping[str, Path],
        blocks: Blocks,
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
        self.statistics: Mapping[str, Statistics] = load(plan, statistics)
        self.statistics_origin = origin(statistics)
        self.blocks = blocks
        self.tensors = plan.tensors
        self.twins = {tensor.tied_to: tensor.name for tensor in plan.tensors if tensor.tied_to is not None}
        self.left = {tensor.name: len(tensor.parts) for tensor in plan.tensors}
        self.lock = Lock()
        self.done_bytes, self.total_bytes = 0, plan.bytes_read

    def run(self, began: float, *, force: bool) -> Result:
        infos = self.plan.stored
        stem = PACKED if self.plan.packed else SINGLE
        shards = layout(list(infos.items()), self.plan.recipe.output.shard_size, stem)
        for note in self.notes:
            self.notice(note)
        writer = Writer(self.output, shards, infos, self._decisive())
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
        except BaseException as error:
            if isinstance(error, RecipeError | CheckpointError) and not isinstance(error, UnreadableError):
                writer.abandon()  # what is made of wrong inputs is not kept
            elif writer.suspend():
                self.notice(f"{writer.journal.folder} keeps the finished shards; the same run goes on from there")
            raise
        return self._result(began, written)

    def _decisive(self) -> dict[str, str]:
        """What decides the bytes; Gram matrices are on no file, so what they are made from does."""
        return decisive(self.plan, self.machine.device, {**sources(self.plan), **self.statistics_origin})

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
        self.tensors = tuple(tensor for tensor in self.plan.tensors if tensor.name in needed)
        self.total_bytes = replace(self.plan, tensors=self.tensors).bytes_read

    def _carry_out(self, sink: Sink) -> None:
        """Sends every tensor through its stages, several slices side by side."""
        self.sink = sink
        with ThreadPoolExecutor(self.machine.workers, "merger-slice") as self.slices:
            try:
                self._settle([tensor for tensor in self.tensors if not tensor.gram])
                if any(tensor.gram for tensor in self.tensors):
                    for ready, known in self.blocks(sink.read):
                        self.statistics = known
                        self._settle([tensor for tensor in ready if tensor in self.tensors])
            except BaseException:
                self.slices.shutdown(wait=False, cancel_futures=True)
                raise

    # --- one tensor ---

    def _settle(self, tensors: Sequence[TensorPlan]) -> None:
        whole: list[tuple[TensorPlan, Part]] = []
        work: list[tuple[TensorPlan, Part]] = []
        for tensor in tensors:
            for part in tensor.parts:
                single = slice_rows(tensor, part) >= part.rows and not tensor.ranked
                (whole if single else work).append((tensor, part))
        reader = Reader(self.plan, self.machine, self.statistics, self._note, partial(_map, self.slices))
        alone = replace(reader, mapper=map)
        with tuned():
            # a matrix that its method must see whole is one slice, so several of them go side by side
            for _ in _map(self.slices, lambda i: self._visit(alone, *whole[i], [], {}), range(len(whole))):
                pass
            settle(
                [tensor.group for tensor, _ in work],
                lambda i, known, ahead: self._visit(reader, *work[i], known, ahead),
            )
            for tensor in tensors:
                if not tensor.parts:  # packed experts, but none of them
                    self._finish(tensor)

    def _visit(
        self, reader: Reader, tensor: TensorPlan, part: Part, known: Sequence[Any], ahead: Ahead
    ) -> Sum | Max | None:
        size = self.plan.bytes_of(tensor, part.rows * part.columns)
        question = self._merge(reader, tensor, part, known, ahead) if tensor.stages else None
        if not tensor.stages:
            self._copy(tensor, part)
        self._count(size, again=question is not None)
        with self.lock:
            self.left[tensor.name] -= question is None
            whole = self.left[tensor.name] == 0
        if whole:
            self._finish(tensor)
        return question

    def _finish(self, tensor: TensorPlan) -> None:
        for rows in tensor.extra:
            self._extra_rows(tensor, rows)
            self._count(self.plan.bytes_of_rows(tensor, rows))
        for name in self._names(tensor):
            self.sink.done(name, self.remarks[tensor.name])

    def _count(self, size: int, *, again: bool = False) -> None:
        """Tells of bytes that were read; what will be read ``again`` is more to do."""
        with self.lock:
            self.done_bytes += size
            self.total_bytes += size if again else 0
            self.tell("merging", self.done_bytes, self.total_bytes)

    def _merge(
        self, reader: Reader, tensor: TensorPlan, part: Part, known: Sequence[Any], ahead: Ahead
    ) -> Sum | Max | None:
        def carry(stored: Tensor, piece: Slice, subject: Subject) -> Flow[None]:
            made: Any = yield from flow(tensor.stages, piece, subject)
            if tensor.packed is None:
                self._put(tensor, part, stored, piece, made)
            else:
                yield from self._put_results(tensor, tensor.packed, part, stored, piece, made)

        return reader.visit(tensor, part, known, ahead, carry)

    def _put(self, tensor: TensorPlan, part: Part, stored: Tensor, piece: Slice, delta: Tensor) -> None:
        """Rounds once to the output's dtype and writes."""
        self._write(self._names(tensor), *self._rounded(tensor, part, stored, piece, delta))

    def _rounded(
        self, tensor: TensorPlan, part: Part, stored: Tensor, piece: Slice, delta: Tensor
    ) -> tuple[int, Tensor]:
        """The first row of a slice in the stored tensor, and what is written from there on."""
        try:
            merged = rounded(tensor, part, stored, piece, delta)
        except OverflowError:
            raise _overflow(tensor) from None
        return part.row + (0 if part.transposed else piece.row), merged

    def _put_results(
        self,
        tensor: TensorPlan,
        packed: Packed,
        part: Part,
        stored: Tensor,
        piece: Slice,
        results: Mapping[str, Tensor],
    ) -> Flow[None]:
        """Writes what a pack made of one slice."""
        others = yield from pieces(packed, results, tensor.parts.index(part), piece.row * part.columns)
        for name, place, values in others:
            dtype = getattr(torch, TORCH_NAMES[packed.infos[name].dtype])
            self._write([name], place, _rounded(values.reshape(-1, 1), dtype, tensor))
        for name, delta in packed.weights(results):
            self._write([name], *self._rounded(tensor, part, stored, piece, delta))

    def _write(self, names: Sequence[str], row: int, values: Tensor) -> None:
        """Writes rows of a tensor, from ``row`` on, under all its names."""
        data = values.contiguous().cpu().flatten().view(torch.uint8).numpy().data
        width = values.shape[-1] * values.element_size()
        for name in names:
            self.sink.write(name, row * width, data)

    def _names(self, tensor: TensorPlan) -> list[str]:
        """The names under which a tensor is written: its results', or its own and that of a head that repeats it."""
        twins = [] if tensor.packed else [twin for of, twin in self.twins.items() if of == tensor.name]
        return [*tensor.stored, *twins]

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
            self._write(self._names(tensor), start, _rounded(values, dtype, tensor))
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
            self._write(self._names(tensor), start, _rounded(mean, dtype, tensor))

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
        files = manifest.copy_side_files(copied, folder)
        config = json_bytes(plan.config)
        write_bytes(folder / "config.json", config)
        files["config.json"] = hashlib.sha256(config).hexdigest()
        record = record_of(
            plan,
            self.machine.device,
            hashes,
            writer.digests(),
            dict(sorted(files.items())),
            sources(plan),
            self.statistics_origin,
            self.notes,
        )
        write_json(folder / RECORD, record)
        card = manifest.card(self.output.name, record["inputs"], record["recipe"], self._counts(), plan.packed)
        write_text(folder / "README.md", card)

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
