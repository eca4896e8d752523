"""The order of work: slices side by side, passes over tensors that are ranked together, blocks in lockstep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from operator import call
from threading import Lock
from typing import TYPE_CHECKING

from merger.calibration.provider import PartialMerge, Source, block_providers
from merger.engine.machine import assign_sizes, tuned
from merger.engine.memory import is_cut
from merger.engine.prepare import Prepared
from merger.engine.progress import ByteProgress, Notes
from merger.engine.reader import PartSlices, Reader
from merger.errors import naming
from merger.ops.questions import Flow
from merger.pipeline.passes import EarlierSums, Mapper, ModelPasses, ModelTotals, OpenTotal, TensorPasses
from merger.planning.plan import Part, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

Unit = tuple[TensorPlan, Part]
"""A unit of work: one matrix of a tensor, or a whole vector."""


class Sink:
    """Receives the tensors of a schedule, from more than one thread; subclasses merge, count or compare them."""

    def carry(self, slices: PartSlices, i: int) -> Flow[None]:
        """Reads slice ``i`` of a part, carries it through the stages, and releases it."""
        raise NotImplementedError

    def copy(self, tensor: TensorPlan, part: Part) -> None:
        """Takes a part of a tensor that has no stages."""

    def end_pass(self, tensor: TensorPlan, part: Part) -> None:
        """Is called after each pass over all slices of a part."""

    def end_tensor(self, tensor: TensorPlan) -> None:
        """Is called when all parts of a tensor have had their last pass."""

    def end(self) -> None:
        """Is called when all tensors have had their last pass."""

    def read(self, name: str) -> Tensor | None:
        """A merged tensor by its name in the output; None until it is complete, and where nothing is merged."""

    def draft(self, name: str, sources: Sequence[Source] = ()) -> Tensor | None:
        """A tensor that waits for inputs of its block, as these alone make it; None where nothing is merged."""


class Schedule:
    """The tensors of a plan in the order and the passes that their stages need.

    Tensors that wait for no block come first, in canonical order; the others follow block by block, as their inputs
    are made. The slices of a tensor are worked on side by side; so are tensors of a single slice.
    """

    def __init__(self, prepared: Prepared, tensors: Sequence[TensorPlan], progress: ByteProgress) -> None:
        self.plan, self.machine, self.inputs = prepared.plan, prepared.machine, prepared.inputs
        self.tensors = tensors
        self.progress = progress
        self.notes = Notes(prepared.options.notice)
        self._model_sources = prepared.inputs.sources()
        self._parts_left = Counter({tensor.name: len(tensor.parts) for tensor in tensors})
        self._lock = Lock()

    def run(self, sink: Sink) -> None:
        """Passes every tensor to the sink; raises the first error of any slice and cancels the waiting slices."""
        with ThreadPoolExecutor(self.machine.workers, "merger-slice") as threads:
            try:
                for tensors, sources in self._batches(sink):
                    reader = Reader(self.plan, self.machine, sources, self.notes.add)
                    self._run_batch(tensors, reader, sink, threads)
                sink.end()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def carry_alone(self, tensor: TensorPlan, sink: Sink, sources: Sequence[Source]) -> None:
        """Gives the slices of a tensor to the sink, with the inputs of these sources; no progress is reported."""
        reader = Reader(self.plan, self.machine, sources, lambda _, __: None)
        for part in tensor.parts:
            slices = reader.slices(tensor, part)
            passes = TensorPasses(partial(sink.carry, slices), slices.sizes, {}, {}, slices.hold, slices.rehearse)
            passes.run(slices.count, map)

    def _batches(self, merge: PartialMerge) -> Iterator[tuple[list[TensorPlan], Sequence[Source]]]:
        """Tensors that do not wait for each other, with the sources of their inputs."""
        yield [tensor for tensor in self.tensors if not tensor.lockstep], self._model_sources
        waiting = {tensor.name for tensor in self.tensors if tensor.lockstep}
        for provider in block_providers(self.plan) if waiting else ():
            for tensors, source in self.inputs.blocks(provider, merge):
                yield [tensor for tensor in tensors if tensor.name in waiting], [source]

    def _run_batch(
        self, tensors: Sequence[TensorPlan], reader: Reader, sink: Sink, threads: ThreadPoolExecutor
    ) -> None:
        units = [(tensor, part) for tensor in tensors for part in tensor.parts]
        single = [unit for unit in units if _is_single_slice(*unit)]
        sliced = [unit for unit in units if not _is_single_slice(*unit)]
        with tuned():
            visits = self._visits_of_single_slices(single, reader, sink)
            for _ in threads.map(call, visits):
                pass
            passes = ModelPasses([tensor.group for tensor, _ in sliced])
            for i in passes:
                totals, sums = passes.model_totals(i), passes.earlier_sums(i)
                passes.record(i, self._visit(sliced[i], reader, sink, totals, sums, threads.map))
            for tensor in tensors:
                if not tensor.parts:  # a tensor of packed experts that holds none
                    sink.end_tensor(tensor)

    def _visits_of_single_slices(
        self, units: Sequence[Unit], reader: Reader, sink: Sink
    ) -> list[Callable[[], OpenTotal | None]]:
        """Visits that each take one thread, dealt out to the devices by size."""
        readers = [replace(reader, machine=machine) for machine in self.machine.per_device()]
        hands = assign_sizes([part.rows * part.columns for _, part in units], len(readers))
        return [
            partial(self._visit, unit, readers[hand], sink, {}, {}, map)
            for unit, hand in zip(units, hands, strict=True)
        ]

    def _visit(
        self,
        unit: Unit,
        reader: Reader,
        sink: Sink,
        model_totals: ModelTotals,
        earlier_sums: EarlierSums,
        mapper: Mapper,
    ) -> OpenTotal | None:
        """Carries the slices of a part as far as the totals over the model allow."""
        tensor, part = unit
        open_total = None
        with naming(tensor.name):
            if tensor.stages:
                slices = reader.slices(tensor, part)
                flow = partial(sink.carry, slices)
                passes = TensorPasses(flow, slices.sizes, model_totals, earlier_sums, slices.hold, slices.rehearse)
                with slices.room():
                    open_total = passes.run(slices.count, _in_turn(mapper) if slices.are_large else mapper)
            else:
                sink.copy(tensor, part)
        self._end_pass(unit, sink, is_last=open_total is None)
        return open_total

    def _end_pass(self, unit: Unit, sink: Sink, *, is_last: bool) -> None:
        tensor, part = unit
        sink.end_pass(tensor, part)
        self.progress.add(self.plan.bytes_of(tensor, part.rows * part.columns), is_reread=not is_last)
        with self._lock:
            self._parts_left[tensor.name] -= is_last
            is_complete = self._parts_left[tensor.name] == 0
        if is_complete:
            sink.end_tensor(tensor)


def _in_turn(mapper: Mapper) -> Mapper:
    """The mapper, one slice after the other."""
    return lambda visit, slices: (result for i in slices for result in mapper(visit, [i]))


def _is_single_slice(tensor: TensorPlan, part: Part) -> bool:
    """Whether a part is one slice that waits for no other tensor, such as a matrix that a stage takes whole."""
    return not is_cut(tensor, part) and not tensor.ranked
