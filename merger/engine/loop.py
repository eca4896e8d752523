"""The loop: every tensor's slices are read, carried through the stages, and given to a sink."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from merger._lazy import torch
from merger.calibration.statistics import Merged, Statistics, load
from merger.checkpoint.tensor_info import TORCH_NAMES
from merger.engine.machine import Machine, dealt, tuned
from merger.engine.memory import SLICE, slice_rows
from merger.engine.reader import Reader, rounded
from merger.engine.transfer import fetched
from merger.errors import CheckpointError
from merger.ops.questions import Flow, Max, Sum
from merger.pipeline.flow import Slice, Subject, flow
from merger.pipeline.passes import Ahead, settle
from merger.planning.packed import Packed, pieces
from merger.planning.plan import ExtraRows, Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is to do as far as is known.

``merging`` counts bytes of input, ``calibrating NAME`` forward passes of a batch through a block.
"""

Block = tuple[list[TensorPlan], Mapping[str, Statistics]]
Blocks = Callable[[Merged], Iterable[Block]]
"""Tensors that take Gram matrices, and these, as `grams` gives them to who can tell what is merged already."""


class Sink(Protocol):
    """What takes a merge's bytes, from several threads at once."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Takes ``data``, which stands from byte ``start`` of a tensor on."""

    def done(self, name: str, notes: Sequence[str]) -> None:
        """Hears that all bytes of a tensor were given, and what was noted about it."""

    def read(self, name: str) -> Tensor | None:
        """Gives back a tensor that is whole, or None."""


class Loop:
    """Carries the tensors of a plan through their stages, several slices side by side."""

    def __init__(
        self,
        plan: Plan,
        machine: Machine,
        statistics: Mapping[str, Path],
        blocks: Blocks,
        progress: Progress,
        notice: Callable[[str], None],
    ) -> None:
        self.plan = plan
        self.machine = machine
        self.tell = progress
        self.notice = notice
        self.notes = list(plan.notes)
        self.remarks: dict[str, list[str]] = {tensor.name: [] for tensor in plan.tensors}
        self.statistics: Mapping[str, Statistics] = load(plan, statistics)
        self.blocks = blocks
        self.tensors = plan.tensors
        self.twins = {tensor.tied_to: tensor.name for tensor in plan.tensors if tensor.tied_to is not None}
        self.left = {tensor.name: len(tensor.parts) for tensor in plan.tensors}
        self.lock = Lock()
        self.done_bytes, self.total_bytes = 0, plan.bytes_read

    def run(self, names: Set[str], sink: Sink) -> None:
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
        alone = [replace(reader, mapper=map, machine=each) for each in self.machine.each()]
        whose = dealt([part.rows * part.columns for _, part in whole], len(alone))
        with tuned():
            # a matrix that its method must see whole is one slice, so several of them go side by side
            for _ in _map(self.slices, lambda i: self._visit(alone[whose[i]], *whole[i], [], {}), range(len(whole))):
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
        data = fetched(values.contiguous()).flatten().view(torch.uint8).numpy().data
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


def _map(pool: ThreadPoolExecutor, function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    return pool.map(function, numbers)
