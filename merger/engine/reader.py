"""Reading the tensors of a plan slice by slice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.calibration.provider import Source
from merger.checkpoint.packed_experts import ROWS
from merger.checkpoint.tensor_info import TORCH_NAMES
from merger.engine.aligned_rows import AlignedTensor
from merger.engine.machine import Machine
from merger.engine.memory import bytes_held, is_sliced, slice_bytes, slice_rows
from merger.errors import CheckpointError
from merger.ops import kernels
from merger.ops.rounding import restored
from merger.ops.transfer import buffer, to_device
from merger.pipeline.flow import Slice, Subject, flow
from merger.pipeline.passes import SampleHints, Sizes, rehearse
from merger.pipeline.stages import step_rows
from merger.planning.plan import Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

MANY = 8
"""Slices from which on a tensor is worth a sample, which may save one of its passes."""
SHARE, PLACES = 64, 8
"""What part of a tensor the sample is, and from how many places of it."""


@dataclass(frozen=True)
class _Stored:
    """Some rows of base and experts as they were read."""

    values: Tensor  # [1+k r c]
    changes: Mapping[int, Tensor]  # by expert, float32, where a change to the base is what is stored [r c]


class PartSlices:
    """The slices of one part of a tensor, for passes over them.

    A slice that was read stays in memory until it is released, if all slices of the part fit there together.
    """

    def __init__(self, reader: Reader, tensor: TensorPlan, part: Part) -> None:
        self.tensor, self.part, self._reader = tensor, part, reader
        self.subject = Subject(
            name=tensor.name,
            kind=tensor.kind,
            place=tensor.place,
            rows=part.rows,
            columns=part.columns,
            seed=reader.plan.recipe.seed,
            first=part.first,
            transposed=part.transposed,
            features_are_rows=part.input_axis == ROWS,
            inputs=reader.inputs(tensor, part),
        )
        elements = part.rows * part.columns
        self._step = slice_rows(tensor, part)
        self.count = -(-part.rows // self._step) if part.columns else 0
        self.sizes = Sizes(elements, reader.ranked_elements[tensor.group] if tensor.ranked else None)
        held_bytes = elements * bytes_held(len(reader.plan.models) - 1)
        self.hold = self.count == 1 or held_bytes <= reader.machine.hold
        self._values_by_slice: dict[int, _Stored] = {}

    @property
    def are_large(self) -> bool:
        """Whether a GPU merges one of these slices at a time, for each is a matrix or a long run of its rows."""
        return self._reader.machine.device != "cpu" and not is_sliced(self.tensor)

    def room(self) -> AbstractContextManager[None]:
        """Memory of the device for a slice that is large or alone; other slices are small enough to need no leave."""
        machine = self._reader.machine
        size = slice_bytes(self._reader.plan, self.tensor, self.part)
        return machine.rooms[machine.device].reserve(size) if self.count == 1 or self.are_large else nullcontext()

    def read(self, i: int) -> tuple[Tensor, Slice]:
        """Slice ``i``: base and experts as stored [1+k r c], and the slice that the stages see."""
        devices = self._reader.machine.devices
        rows = range(i * self._step, min((i + 1) * self._step, self.part.rows))
        read = self._values_by_slice.get(i) or self._reader.read_rows(
            self.tensor, self.part, rows, devices[i % len(devices)]
        )
        if self.sizes.tensor * read.values.itemsize * len(read.values) <= self._reader.machine.hold:
            self._values_by_slice[i] = read  # a question may start the flow of this slice again
        return read.values, self._reader.slice_of(self.tensor, self.part, rows.start, read)

    def release(self, i: int) -> None:
        """Lets slice ``i`` go when its flow is at its end."""
        self._values_by_slice.pop(i, None)

    def rehearse(self) -> SampleHints:
        """The hints of the stages' flows over a sample: `PLACES` groups of rows, together a share of the part.

        There are none where the part has too few slices for a sample to save a pass.
        """
        if self.count < MANY:
            return {}
        part, stages = self.part, self.tensor.stages
        rows = step_rows(part.columns, stages, self.sizes.tensor // SHARE // PLACES)
        starts = range(0, part.rows - rows + 1, rows * max(1, part.rows // rows // PLACES))
        device = self._reader.machine.device
        groups = [self._reader.read_rows(self.tensor, part, range(row, row + rows), device) for row in starts]
        changes = {k: torch.cat([group.changes[k] for group in groups]) for k in groups[0].changes}
        read = _Stored(torch.cat([group.values for group in groups], 1), changes)
        sample = self._reader.slice_of(self.tensor, part, 0, read)
        return rehearse(partial(flow, stages, sample, self.subject), sample.base.numel())


@dataclass(frozen=True)
class Reader:
    """Reads the merged tensors of a plan; ``note`` takes remarks on a tensor."""

    plan: Plan
    machine: Machine
    sources: Sequence[Source]
    note: Callable[[TensorPlan, str], None]

    @cached_property
    def ranked_elements(self) -> Mapping[int, int]:
        """How many elements are ranked together, by group of tensors."""
        sizes: Counter[int] = Counter()
        for tensor in self.plan.tensors:
            sizes[tensor.group] += tensor.elements if tensor.stages else 0
        return sizes

    def inputs(self, tensor: TensorPlan, part: Part) -> Mapping[str, Tensor]:
        """The inputs of one matrix for its stages, by name."""
        inputs: dict[str, Tensor] = {}
        for source in self.sources if tensor.inputs else ():
            inputs |= source.of_part(tensor, part, partial(self.note, tensor))
        return inputs

    def slices(self, tensor: TensorPlan, part: Part) -> PartSlices:
        """The slices of one part of a tensor."""
        return PartSlices(self, tensor, part)

    def read_rows(self, tensor: TensorPlan, part: Part, rows: range, device: str) -> _Stored:
        """Some rows of a part as they are stored, on the device that is to work on them."""
        first, last = part.row + rows.start, part.row + rows.stop
        if part.transposed:
            first, last = part.row, part.row + part.columns  # rows of the stored tensor are its columns
        models = [AlignedTensor.of(self.plan, tensor, label) for label in ("base", *tensor.place.experts)]
        dtypes = [model.dtype for model in models if model is not None]
        shape = len(models), last - first, part.rows if part.transposed else part.columns
        stored = buffer(shape, reduce(torch.promote_types, dtypes), device)
        base, *experts = models
        assert base is not None, "the planner refuses tensors that the base lacks"
        base.read_into(stored[0], first, last)
        changes = {}
        for k, expert in enumerate(experts):
            change = None if expert is None else expert.change_rows(first, last, base)
            if expert is None:  # `missing: zero`
                stored[k + 1] = stored[0]
            elif change is not None:
                torch.add(stored[0], change, out=stored[k + 1])
                changes[k] = to_device(change, device)
            else:
                expert.read_into(stored[k + 1], first, last, absent=stored[0])
        _equalise(tensor, range(first, last), stored, changes)
        return _Stored(to_device(stored, device), changes)

    def slice_of(self, tensor: TensorPlan, part: Part, row: int, read: _Stored) -> Slice:
        """The slice that the stages see."""
        refuse = partial(_refuse, tensor, read.values)
        base, deltas = kernels.for_stored(read.values).difference(read.values, refuse)
        if read.changes:
            deltas = torch.stack([read.changes.get(k, delta) for k, delta in enumerate(deltas)])
            _check_finite(tensor, base, deltas)
        if part.transposed:
            base, deltas = base.T, deltas.transpose(1, 2)
        return Slice(row, base, deltas)


def _equalise(tensor: TensorPlan, rows: range, stored: Tensor, changes: Mapping[int, Tensor]) -> None:
    """Sets rows that are not merged to the base's in all experts, so that no stage counts them as changed."""
    is_vector = len(tensor.info.shape) == 1  # one row of the file, with an element for each token
    values = stored.transpose(1, 2) if is_vector else stored
    start = 0 if is_vector else rows.start
    for extra in tensor.extra:
        places = slice(max(extra.start - start, 0), max(extra.stop - start, 0))
        values[1:, places] = values[:1, places]
        for change in changes.values():
            (change.T if is_vector else change)[places] = 0


def rounded(tensor: TensorPlan, part: Part, stored: Tensor, piece: Slice, delta: Tensor) -> Tensor:
    """Returns the output values of a merged delta [r c]: rounded once to the output's dtype, in the stored orientation.

    A position that ends at an input's value has that input's bits.
    """
    base, deltas = piece.base, piece.deltas
    if part.transposed:
        base, deltas, delta = base.T, deltas.transpose(1, 2), delta.T
    return restored(stored, base, deltas, delta, getattr(torch, TORCH_NAMES[tensor.info.dtype]))


def _refuse(tensor: TensorPlan, stored: Tensor) -> None:
    """CheckpointError that names the model whose values, or whose difference from the base, are not finite."""
    values = stored.float()
    _check_finite(tensor, values[0], values[1:] - values[0])


def _check_finite(tensor: TensorPlan, base: Tensor, deltas: Tensor) -> None:
    """CheckpointError that names the model if any value is NaN or infinite."""
    if not torch.isfinite(base).all():
        raise CheckpointError(f"base: {tensor.reads['base']} holds NaN or infinity")
    for k, label in enumerate(tensor.place.experts):
        if not torch.isfinite(deltas[k]).all():
            raise CheckpointError(f"{label}: {tensor.reads[label]} holds NaN or infinity")
