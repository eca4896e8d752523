"""Reading a plan's tensors slice by slice, and carrying each slice through a flow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.calibration.statistics import Statistics, inputs_of
from merger.checkpoint.tensor_info import TORCH_NAMES
from merger.engine.machine import Machine
from merger.engine.memory import bytes_held, slice_rows
from merger.engine.transfer import buffer, sent
from merger.errors import CheckpointError, naming
from merger.ops import kernels
from merger.ops.questions import Flow, Max, Sum
from merger.ops.rounding import restored
from merger.pipeline.flow import Slice, Subject, flow
from merger.pipeline.passes import Ahead, Mapper, Sizes, rehearsal, run
from merger.pipeline.stages import step_rows
from merger.planning.plan import Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

MANY = 8
"""Slices from which on a tensor is worth a sample, which may save one of its passes."""
SHARE, PLACES = 64, 8
"""What part of a tensor the sample is, and from how many places of it."""

Carry = Callable[["Tensor", Slice, Subject], Flow[None]]
"""What is done with one slice: given base and experts as stored [1+k r c], and the same as base and deltas."""


@dataclass(frozen=True)
class _Stored:
    """Some rows of base and experts as they were read."""

    values: Tensor  # [1+k r c]
    changes: Mapping[int, Tensor]  # by expert, float32, where a change to the base is what is stored [r c]


@dataclass(frozen=True)
class Reader:
    """Reads the merged tensors of a plan; ``mapper`` puts slices to work side by side."""

    plan: Plan
    machine: Machine
    statistics: Mapping[str, Statistics]
    notice: Callable[[TensorPlan, str], None]
    mapper: Mapper = map

    @cached_property
    def sizes(self) -> Mapping[int, int]:
        """How many elements are ranked together, by group of tensors."""
        sizes: Counter[int] = Counter()
        for tensor in self.plan.tensors:
            sizes[tensor.group] += tensor.elements if tensor.stages else 0
        return sizes

    def visit(
        self, tensor: TensorPlan, part: Part, known: Sequence[Any], ahead: Ahead, carry: Carry
    ) -> Sum | Max | None:
        """Carries all slices of a part as far as what is ``known`` of the model allows, as `passes.run` does."""
        subject = Subject(
            name=tensor.name,
            kind=tensor.kind,
            place=tensor.place,
            rows=part.rows,
            columns=part.columns,
            seed=self.plan.recipe.seed,
            first=part.row * part.columns,
            transposed=part.transposed,
            inputs=inputs_of(tensor, part, self.statistics, partial(self.notice, tensor)),
        )
        step = slice_rows(tensor, part)
        count = -(-part.rows // step) if part.columns else 0
        elements = part.rows * part.columns
        hold = count == 1 or elements * bytes_held(len(self.plan.models) - 1) <= self.machine.hold
        kept: dict[int, _Stored] = {}
        devices = self.machine.devices

        def start(j: int) -> Flow[None]:
            rows = range(j * step, min((j + 1) * step, part.rows))
            read = kept.get(j) or self._read(tensor, part, rows, devices[j % len(devices)])
            if elements * read.values.itemsize * len(read.values) <= self.machine.hold:
                kept[j] = read  # should the flow ask, it will be started again
            yield from carry(read.values, self._slice(tensor, part, j * step, read), subject)
            kept.pop(j, None)

        sizes = Sizes(elements, self.sizes[tensor.group])
        rehearse = partial(self._rehearsed, tensor, part, subject) if count >= MANY else tuple
        with naming(tensor.name):
            return run(
                count, start, sizes=sizes, known=known, ahead=ahead, hold=hold, mapper=self.mapper, rehearse=rehearse
            )

    def _rehearsed(self, tensor: TensorPlan, part: Part, subject: Subject) -> list[Any]:
        """What the stages find after each guess of a sample: `PLACES` groups of rows, a share of the whole together."""
        wanted = part.rows * part.columns // SHARE // PLACES
        rows = step_rows(part.columns, tensor.stages, wanted)
        starts = range(0, part.rows - rows + 1, rows * max(1, part.rows // rows // PLACES))
        groups = [self._read(tensor, part, range(row, row + rows), self.machine.device) for row in starts]
        changes = {k: torch.cat([group.changes[k] for group in groups]) for k in groups[0].changes}
        read = _Stored(torch.cat([group.values for group in groups], 1), changes)
        sample = self._slice(tensor, part, 0, read)
        return rehearsal(partial(flow, tensor.stages, sample, subject), sample.base.numel())

    def _read(self, tensor: TensorPlan, part: Part, rows: range, device: str) -> _Stored:
        """Some rows of a part as they are stored, on the device that is to work on them."""
        first, last = part.row + rows.start, part.row + rows.stop
        if part.transposed:
            first, last = part.row, part.row + part.columns  # rows of the stored tensor are its columns
        models = [(self.plan.models[label], tensor.reads[label]) for label in ("base", *tensor.place.experts)]
        dtypes = [model.dtype(name) for model, name in models if name is not None]
        shape = len(models), last - first, part.rows if part.transposed else part.columns
        stored = buffer(shape, reduce(torch.promote_types, dtypes), device)
        changes = {}
        for k, (model, name) in enumerate(models):
            change = None if name is None else model.change_rows(name, first, last)
            if name is None:  # `missing: zero`
                stored[k] = stored[0]
            elif change is not None:
                changes[k - 1] = change
                torch.add(stored[0], change, out=stored[k])
            elif len(tensor.info.shape) == 1 and model.tensors[name].elements > part.columns:  # a longer vocabulary
                stored[k] = model.read_rows(name, first, last)[:, : part.columns]
            else:
                model.read_into(stored[k], name, first, last)
        return _Stored(sent(stored, device), changes)

    def _slice(self, tensor: TensorPlan, part: Part, row: int, read: _Stored) -> Slice:
        """The slice that the stages see."""
        refuse = partial(_refuse, tensor, read.values)
        base, deltas = kernels.for_stored(read.values).difference(read.values, refuse)
        if read.changes:
            deltas = torch.stack([read.changes.get(k, delta) for k, delta in enumerate(deltas)])
            _check_finite(tensor, base, deltas)
        if part.transposed:
            base, deltas = base.T, deltas.transpose(1, 2)
        return Slice(row, base, deltas)


def rounded(tensor: TensorPlan, part: Part, stored: Tensor, piece: Slice, delta: Tensor) -> Tensor:
    """What is written for a merged delta [r c]: rounded once to the output's dtype, in the stored orientation.

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
