"""The walk over all tensors: each slice is read, carried through the stages, and counted between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.engine.prepare import Prepared
from merger.engine.progress import ByteProgress
from merger.engine.reader import PartSlices, rounded
from merger.engine.schedule import Schedule, Sink
from merger.inspection.counters import ExpertSlice, MergedSlice
from merger.inspection.curves import selection_levels
from merger.inspection.part_counts import PartCounts
from merger.inspection.request import RESULT, TASK_VECTORS, InspectionRequest, ViewKey
from merger.ops.questions import Flow
from merger.pipeline.flow import Slice, Subject, flow
from merger.planning.plan import Part, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.checkpoint import Checkpoint

CountSlice = Callable[[PartCounts, TensorPlan, "Tensor", Slice, Subject], Flow[None]]
"""Carries one slice of a part through the stages and counts what is compared there."""


class Walk(Sink):
    """One inspection of a plan: counts every slice of every merged tensor."""

    def __init__(self, prepared: Prepared, request: InspectionRequest) -> None:
        self.plan, self.options = prepared.plan, prepared.options
        self.request = request
        experts = tuple(self.plan.recipe.experts)
        merged = [tensor for tensor in self.plan.tensors if tensor.stages]
        tensors = [tensor for tensor in merged if tensor.place.experts == experts]
        left_out = len(merged) - len(tensors)
        self.remarks = [f"{left_out} tensors that `layers` merge of some experts are left out"] if left_out else []
        self.work = [(tensor, part, PartCounts(tensor, part, request)) for tensor in tensors for part in tensor.parts]
        self._counts = {part.name: counts for _, part, counts in self.work}
        total = sum(self.plan.bytes_of(tensor, tensor.elements) for tensor in tensors)
        self.progress = ByteProgress("inspecting", total, self.options.progress)
        self._schedule = Schedule(prepared, tensors, self.progress)

    def run(self, count_slice: CountSlice) -> None:
        """Counts every slice with ``count_slice``."""
        self._count_slice = count_slice
        self._schedule.run(self)

    def carry(self, slices: PartSlices, i: int) -> Flow[None]:
        """Reads a slice and counts it between its stages."""
        stored, piece = slices.read(i)
        counts = self._counts[slices.part.name]
        yield from self._count_slice(counts, slices.tensor, stored, piece, slices.subject)
        slices.release(i)

    def end_pass(self, tensor: TensorPlan, part: Part) -> None:
        """Adds up the slices that were counted in a pass."""
        self._counts[part.name].close_views()


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
    prefix = f"{tensor.choice.replace(' ', '')}." if tensor.group else ""
    views = []
    for i, name in enumerate(names):
        repeats = names[:i].count(name)
        label = f"{prefix}{name}{repeats + 1 if repeats else ''}"
        views.append(ViewKey(tensor.group, i, label, "merged"))
    return [*views[:-1], RESULT]
