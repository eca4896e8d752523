"""Writes the tensors of a merge: merged slices, copies, rows that only some models have, packed results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from merger._lazy import torch
from merger.calibration.provider import Source
from merger.checkpoint.tensor_info import Info, torch_dtype
from merger.engine.aligned_rows import AlignedTensor
from merger.engine.memory import SLICE, slice_rows
from merger.engine.prepare import Prepared
from merger.engine.progress import ByteProgress
from merger.engine.reader import PartSlices, rounded
from merger.engine.schedule import Schedule, Sink
from merger.errors import CheckpointError
from merger.ops.questions import Flow
from merger.ops.transfer import to_host
from merger.pipeline.flow import Slice, flow
from merger.planning.packed import Packed, pieces
from merger.planning.plan import ExtraRows, Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor


class ByteSink(Protocol):
    """Where the bytes of a merge go; several threads call it at once."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Takes ``data``, the bytes of a tensor from ``start`` on."""

    def finish_tensor(self, name: str, notes: Sequence[str]) -> None:
        """Is called when all bytes of a tensor were given, with the remarks on it."""

    def read(self, name: str) -> Tensor | None:
        """A tensor by its name; None until it is complete."""


class MemoryOutput:
    """Tensors in memory, as they would be written; many threads may write at once."""

    def __init__(self, infos: Mapping[str, Info]) -> None:
        self._values = {name: torch.empty(info.shape, dtype=torch_dtype(info)) for name, info in infos.items()}
        self._bytes = {name: values.view(-1).view(torch.uint8).numpy() for name, values in self._values.items()}

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Stores bytes of a tensor, beginning at byte ``start``."""
        self._bytes[name][start : start + data.nbytes] = data.cast("B")

    def finish_tensor(self, name: str, notes: Sequence[str]) -> None:
        """Nothing is left to do for a complete tensor."""

    def read(self, name: str) -> Tensor:
        """The tensor, complete or not."""
        return self._values[name]


def merge_schedule(prepared: Prepared, names: Set[str]) -> Schedule:
    """The schedule that makes the tensors ``names`` of the output, and those that are ranked together with them.

    A tensor that an adapter leaves out is measured if ``names`` holds its name in the plan.
    """
    plan = prepared.plan
    tensors = _needed(plan, names)
    total = replace(plan, tensors=tensors).bytes_read
    return Schedule(prepared, tensors, ByteProgress("merging", total, prepared.options.progress))


def _needed(plan: Plan, names: Set[str]) -> tuple[TensorPlan, ...]:
    makers = [tensor for tensor in plan.tensors if not names.isdisjoint([tensor.name, *plan.written_names(tensor)])]
    ranked_groups = {tensor.group for tensor in makers if tensor.ranked}
    needed = {tensor.name for tensor in makers}
    needed |= {tensor.name for tensor in plan.tensors if tensor.ranked and tensor.group in ranked_groups}
    return tuple(tensor for tensor in plan.tensors if tensor.name in needed)


class MergeSink(Sink):
    """Merges the slices of a schedule and gives the bytes of the output to a `ByteSink`."""

    def __init__(self, schedule: Schedule, output: ByteSink) -> None:
        self.plan, self.notes, self.progress = schedule.plan, schedule.notes, schedule.progress
        self.schedule, self.output = schedule, output

    def carry(self, slices: PartSlices, i: int) -> Flow[None]:
        """Reads a slice, merges it, and writes the result."""
        tensor = slices.tensor
        stored, piece = slices.read(i)
        result: Any = yield from flow(tensor.stages, piece, slices.subject)
        if tensor.packed is None:
            self._write_merged(tensor, *_rounded(slices, stored, piece, result))
        else:
            yield from self._write_results(tensor.packed, slices, stored, piece, result)
        slices.release(i)

    def copy(self, tensor: TensorPlan, part: Part) -> None:
        """Copies a part row by row; notes the models whose values differ."""
        dtype = torch_dtype(tensor.info)
        step = slice_rows(tensor, part)
        source = tensor.reads[tensor.source]
        assert source is not None, "a tensor is copied from a model that has it"
        shape = self.plan.models[tensor.source].tensors[source].shape
        stored_names = {label: name for label, name in tensor.reads.items() if label != tensor.source and name}
        changed_labels = set()
        for start in range(0, part.rows if part.columns else 0, step):
            rows = range(start, min(start + step, part.rows))
            values = self.plan.models[tensor.source].read_rows(source, rows.start, rows.stop)
            changed_labels |= {
                label for label, name in stored_names.items() if not self._has(label, name, shape, rows, values)
            }
            self._write(self.plan.written_names(tensor), start, _cast(_scaled(values, tensor.scale), dtype, tensor))
        if changed_labels:
            labels = ", ".join(sorted(changed_labels))
            self.notes.add(tensor, f"{tensor.name}: copied from {tensor.source}, but differs in {labels}")

    def end_tensor(self, tensor: TensorPlan) -> None:
        """Writes rows that are not merged, and says that the tensor is complete."""
        for rows in tensor.extra:
            self._write_extra_rows(tensor, rows)
            self.progress.add(self.plan.bytes_of_rows(tensor, rows))
        for name in self.plan.written_names(tensor):
            self.output.finish_tensor(name, self.notes.on(tensor))

    def read(self, name: str) -> Tensor | None:
        """A merged tensor; None until it is complete."""
        return self.output.read(name)

    def draft(self, name: str, sources: Sequence[Source] = ()) -> Tensor | None:
        """A tensor as it is merged with these inputs of its block alone; None where it waits for none."""
        tensor = next((tensor for tensor in self.plan.tensors if tensor.name == name and tensor.lockstep), None)
        if tensor is None:
            return None
        output = MemoryOutput({name: tensor.info})
        self.schedule.carry_alone(tensor, MergeSink(self.schedule, output), sources)
        return output.read(name)

    def _has(self, label: str, name: str, shape: Sequence[int], rows: range, values: Tensor) -> bool:
        """Whether a model's tensor has this shape, and these values in these rows."""
        model = self.plan.models[label]
        return model.tensors[name].shape == shape and torch.equal(values, model.read_rows(name, rows.start, rows.stop))

    def _write_merged(self, tensor: TensorPlan, row: int, values: Tensor) -> None:
        """Writes the merged values of a slice from ``row`` on, but for rows that are not merged."""
        values = values.reshape(-1, 1) if len(tensor.info.shape) == 1 else values
        for first, last in tensor.merged_rows(row, row + len(values)):
            self._write(self.plan.written_names(tensor), first, values[first - row : last - row])

    def _write_results(
        self, packed: Packed, slices: PartSlices, stored: Tensor, piece: Slice, results: Mapping[str, Tensor]
    ) -> Flow[None]:
        """Writes the results of a pack for one slice."""
        tensor, part = slices.tensor, slices.part
        stored_pieces = yield from pieces(packed, results, tensor.parts.index(part), piece.row * part.columns)
        for name, place, values in stored_pieces:
            self._write([name], place, _cast(values.reshape(-1, 1), torch_dtype(packed.infos[name]), tensor))
        for name, delta in packed.weights(results):
            self._write([name], *_rounded(slices, stored, piece, delta))

    def _write_extra_rows(self, tensor: TensorPlan, rows: ExtraRows) -> None:
        """Writes rows that are not merged: the mean of some models, or zeros."""
        dtype = torch_dtype(tensor.info)
        columns = 1 if len(tensor.info.shape) == 1 else tensor.info.matrix[1]
        step = max(1, SLICE // max(1, columns))
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            values = [self._read_extra_rows(tensor, label, start, stop) for label in rows.models]
            mean = values[0] if len(values) == 1 else _mean(values, (stop - start, columns))
            self._write(self.plan.written_names(tensor), start, _cast(mean, dtype, tensor))

    def _read_extra_rows(self, tensor: TensorPlan, label: str, start: int, stop: int) -> Tensor:
        """Rows of one model [r c]; CheckpointError if they are not finite."""
        model = AlignedTensor.of(self.plan, tensor, label)
        assert model is not None, "the planner names models that have the rows"
        values = model.read_tokens(start, stop)
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{label}: {model.name} holds NaN or infinity")
        return values

    def _write(self, names: Sequence[str], row: int, values: Tensor) -> None:
        """Writes rows of a tensor, from ``row`` on, under all its names."""
        data = to_host(values.contiguous()).flatten().view(torch.uint8).numpy().data
        width = values.shape[-1] * values.element_size()
        for name in names:
            self.output.write(name, row * width, data)


def _mean(values: Sequence[Tensor], shape: tuple[int, int]) -> Tensor:
    """The mean of rows of this shape in float64; zeros where there are none."""
    return torch.stack([rows.double() for rows in values]).mean(0) if values else torch.zeros(shape)


def _rounded(slices: PartSlices, stored: Tensor, piece: Slice, delta: Tensor) -> tuple[int, Tensor]:
    """The first row of a slice in the stored tensor, and its merged values, rounded once to the output's dtype."""
    tensor, part = slices.tensor, slices.part
    try:
        merged = rounded(tensor, part, stored, piece, delta)
    except OverflowError:
        raise overflow(tensor, tensor.info.dtype) from None
    return part.row + (0 if part.transposed else piece.row), merged


def _scaled(values: Tensor, scale: float) -> Tensor:
    """Copied values times a factor, in float32 or wider; the values as they are where it is 1."""
    return values if scale == 1 else values.to(torch.promote_types(values.dtype, torch.float32)) * scale


def _cast(values: Tensor, dtype: torch.dtype, tensor: TensorPlan) -> Tensor:
    """``values`` in another dtype; CheckpointError if a finite value becomes infinite."""
    cast = values.to(dtype)
    if dtype != values.dtype and not torch.equal(torch.isfinite(cast), torch.isfinite(values)):
        raise overflow(tensor, tensor.info.dtype)
    return cast


def overflow(tensor: TensorPlan, dtype: str) -> CheckpointError:
    """The error of merged values that are too large for the dtype of the output."""
    return CheckpointError(
        f"{tensor.name}: the merged values overflow {dtype}; lower lambda or the weights, or set output.dtype: float32"
    )
