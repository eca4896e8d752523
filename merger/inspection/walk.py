"""The walk over all tensors: each slice is read, carried through the stages, and counted between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.calibration.statistics import Statistics
from merger.engine.machine import Machine, tuned
from merger.engine.reader import Reader, rounded
from merger.inspection.counters import ExpertSlice, MergedSlice
from merger.inspection.curves import selection_levels
from merger.inspection.part_counts import PartCounts
from merger.inspection.request import RESULT, TASK_VECTORS, InspectionRequest, ViewKey
from merger.ops.questions import Flow, Max, Sum
from merger.pipeline.flow import Slice, Subject, flow
from merger.pipeline.passes import Ahead, settle
from merger.planning.plan import Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.checkpoint import Checkpoint

Blocks = Iterable[tuple[list[TensorPlan], Mapping[str, Statistics]]]
"""The tensors of each block whose stages need Gram matrices, with those matrices."""
CountSlice = Callable[[PartCounts, TensorPlan, "Tensor", Slice, Subject], Flow[None]]
"""Carries one slice of a part through the stages and counts what is compared there."""


class Walk:
    """One inspection of a plan: counts every slice of every merged tensor."""

    def __init__(
        self,
        plan: Plan,
        machine: Machine,
        statistics: Mapping[str, Statistics],
        *,
        notice: Callable[[str], None],
        progress: Callable[[str, int, int], None],
        request: InspectionRequest,
    ) -> None:
        self.plan, self.machine, self.statistics = plan, machine, statistics
        self.notice, self.tell = notice, progress
        self.request = request
        self.work = [
            (tensor, part, PartCounts(tensor, part, request))
            for tensor in plan.tensors
            if tensor.stages
            for part in tensor.parts
        ]
        self.lock = Lock()
        self.done_bytes = 0
        self.total_bytes = sum(plan.bytes_of(t, part.rows * part.columns) for t, part, _ in self.work)

    def run(self, count_slice: CountSlice, blocks: Blocks = ()) -> None:
        """Visits every tensor until no stage has a question; ``blocks`` are the tensors that need Gram matrices."""
        with ThreadPoolExecutor(self.machine.workers, "merger-slice") as slices:
            reader = Reader(
                self.plan, self.machine, self.statistics, lambda _, message: self.notice(message), slices.map
            )
            try:
                self._settle(reader, count_slice, [tensor for tensor in self.plan.tensors if not tensor.gram])
                for ready, statistics in blocks:
                    self._settle(replace(reader, statistics=statistics), count_slice, ready)
            except BaseException:
                slices.shutdown(wait=False, cancel_futures=True)
                raise

    def _settle(self, reader: Reader, count_slice: CountSlice, tensors: Iterable[TensorPlan]) -> None:
        names = {tensor.name for tensor in tensors}
        work = [each for each in self.work if each[0].name in names]
        with tuned():
            settle(
                [t.group for t, *_ in work],
                lambda i, known, ahead: self._visit(reader, count_slice, *work[i], known, ahead),
            )

    def _visit(
        self,
        reader: Reader,
        count_slice: CountSlice,
        tensor: TensorPlan,
        part: Part,
        counts: PartCounts,
        known: Sequence[Any],
        ahead: Ahead,
    ) -> Sum | Max | None:
        question = reader.visit(tensor, part, known, ahead, partial(count_slice, counts, tensor))
        counts.close_views()
        size = self.plan.bytes_of(tensor, part.rows * part.columns)
        with self.lock:
            self.done_bytes += size
            self.total_bytes += 0 if question is None else size
            self.tell("inspecting", self.done_bytes, self.total_bytes)
        return question


# --- what is counted of a slice -------------------------------------------------------------------


def count_stages(counts: PartCounts, tensor: TensorPlan, stored: Tensor, piece: Slice, subject: Subject) -> Flow[None]:
    """Counts the task vectors before the recipe's stages, after each, and the merged vector."""
    views = stage_views(tensor)
    yield from count_task_vectors(counts, tensor, stored, piece, subject)

    def look(i: int, deltas: Tensor) -> None:
        if tensor.stages[i].entry.packing is not None:
            return  # a pack has results of several kinds; an inspection of the output compares them
        if deltas.dim() == 3:
            counts.count(replace(views[i], subject="experts"), ExpertSlice(piece.row, piece.base, deltas))
        elif not counts.has(views[i], piece.row):
            compared: tuple[Tensor, Tensor | None, Tensor] = (deltas, None, piece.deltas)
            if views[i] == RESULT:
                result = rounded(tensor, counts.part, stored, piece, deltas)
                compared = (result, *_inputs(stored, result.dtype))
            counts.count(views[i], MergedSlice(piece.row, deltas, piece.deltas, *compared))

    yield from flow(tensor.stages, piece, subject, look)


def count_task_vectors(
    counts: PartCounts, tensor: TensorPlan, stored: Tensor, piece: Slice, subject: Subject
) -> Flow[None]:
    """Counts the task vectors alone."""
    yield from _count_experts(counts, piece.row, piece.base, piece.deltas)


def count_finished_merge(
    merge: Checkpoint, counts: PartCounts, tensor: TensorPlan, stored: Tensor, piece: Slice, subject: Subject
) -> Flow[None]:
    """Counts the task vectors, and beside them a finished ``merge``, which is read as the last of the experts."""
    experts = piece.deltas[:-1]
    yield from _count_experts(counts, piece.row, piece.base, experts)
    if not counts.has(RESULT, piece.row):
        dtype = merge.dtype(tensor.name)
        compared = stored[-1].to(dtype), *_inputs(stored[:-1], dtype)
        counts.count(RESULT, MergedSlice(piece.row, piece.deltas[-1], experts, *compared))


def _count_experts(counts: PartCounts, row: int, base: Tensor, deltas: Tensor) -> Flow[None]:
    counts.count(TASK_VECTORS, ExpertSlice(row, base, deltas))
    if counts.needs_levels:
        counts.count_levels(row, (yield from selection_levels(deltas, counts.part.rows * counts.part.columns)))


def _inputs(stored: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Base and experts as a merge in this dtype would copy them."""
    return stored[0].to(dtype), stored[1:].to(dtype)


def stage_views(tensor: TensorPlan) -> list[ViewKey]:
    """The view after each stage: the stage's own name, numbered where it comes again."""
    names = [stage.entry.name for stage in tensor.stages]
    prefix = f"rule{tensor.group}." if tensor.group else ""
    views = []
    for i, name in enumerate(names):
        repeats = names[:i].count(name)
        label = f"{prefix}{name}{repeats + 1 if repeats else ''}"
        views.append(ViewKey(tensor.group, i, label, "merged"))
    return [*views[:-1], RESULT]
