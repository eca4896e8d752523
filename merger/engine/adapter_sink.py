"""Writes a merge as an adapter: the factors of each matrix, and the share of the change that they lack."""

from __future__ import annotations

import math
from collections.abc import Iterable
from threading import Lock
from typing import NamedTuple

from merger.checkpoint.tensor_info import torch_dtype
from merger.engine.merge_sink import ByteSink, MergeSink, overflow
from merger.engine.reader import PartSlices
from merger.engine.schedule import Schedule
from merger.ops.factor_pair import FactorPair, squared_norm
from merger.ops.questions import Flow
from merger.pipeline.flow import flow
from merger.planning.plan import Part, TensorPlan

NEGLIGIBLE = 5e-5
"""Share of the norm of a change up to which an error is told as rounding, since four digits would show 0."""


class _Change(NamedTuple):
    """The squared norms of a tensor's change, or of a slice of it, and of the part that the adapter lacks."""

    tensor: str
    size: float
    error: float
    is_factored: bool


class AdapterSink(MergeSink):
    """Merges the slices of a schedule and gives the bytes of factors to a `ByteSink`."""

    def __init__(self, schedule: Schedule, output: ByteSink) -> None:
        super().__init__(schedule, output)
        self._changes: list[_Change] = []
        self._lock = Lock()

    def carry(self, slices: PartSlices, i: int) -> Flow[None]:
        """Reads a slice and merges it; writes the factors of a matrix, and measures what has none."""
        tensor = slices.tensor
        _, piece = slices.read(i)
        result = yield from flow(tensor.stages, piece, slices.subject)
        if isinstance(result, FactorPair):
            self._write_factors(tensor, result)
            change = _Change(tensor.name, result.change, result.error, is_factored=True)
        else:
            size = squared_norm(result)
            change = _Change(tensor.name, size, size, is_factored=False)
        with self._lock:
            self._changes.append(change)
        slices.release(i)

    def copy(self, tensor: TensorPlan, part: Part) -> None:
        """Leaves a tensor that is the base's to the base."""

    def end_tensor(self, tensor: TensorPlan) -> None:
        """Does nothing: an adapter's tensors are complete together, with a remark on all of them."""

    def end(self) -> None:
        """Says what the adapter lacks, and that its tensors are complete."""
        factored = [tensor for tensor in self.schedule.tensors if tensor.factors]
        written = {name for tensor in factored for name in tensor.stored}
        scheduled = {tensor.name for tensor in self.schedule.tensors}
        if written == self.plan.stored.keys() and self.plan.left_out <= scheduled:
            for note in _describe(self._changes):
                self.notes.add(factored[0], note)
        for tensor in factored:
            for name in tensor.stored:
                self.output.finish_tensor(name, self.notes.on(tensor))

    def _write_factors(self, tensor: TensorPlan, pair: FactorPair) -> None:
        for (name, info), values in zip(tensor.stored.items(), (pair.down, pair.up), strict=True):
            assert (values.shape, values.dtype) == (info.shape, torch_dtype(info)), "the plan has the factors' shapes"
            if not values.isfinite().all():
                raise overflow(tensor, info.dtype)
            self._write([name], 0, values)


def _describe(changes: Iterable[_Change]) -> list[str]:
    """Sentences on what an adapter lacks of a merge; the same ones in whatever order slices were merged."""
    ordered = sorted(changes)
    factored = [change for change in ordered if change.is_factored]
    left_out = [change for change in ordered if not change.is_factored and change.size]
    total = math.fsum(change.size for change in ordered)
    whole = _share(math.fsum(change.error for change in ordered), total)
    error = _share(math.fsum(change.error for change in factored), math.fsum(change.size for change in factored))
    if error < NEGLIGIBLE:
        sentences = ["the adapter holds the change of its matrices to rounding"]
    else:
        worst = max(factored, key=lambda change: _share(change.error, change.size))
        sentences = [
            f"the adapter's error is {error:.4f} of the norm of its matrices' change, at most "
            f"{_share(worst.error, worst.size):.4f} ({worst.tensor}), and {whole:.4f} of the model's"
        ]
    if left_out:
        names = list(dict.fromkeys(change.tensor for change in left_out))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        share = _share(math.fsum(change.size for change in left_out), total)
        sentences.append(
            f"the adapter leaves out the change of {', '.join(names[:3])}{more}, {share:.4f} of the norm of the "
            "model's; `form: model` keeps it"
        )
    return sentences


def _share(part: float, total: float) -> float:
    """The ratio of two norms, given their squares."""
    return math.sqrt(part / total) if total else 0.0
