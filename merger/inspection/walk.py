"""The walk over all tensors: each slice is read, carried through the stages, and counted between them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from merger._lazy import torch
from merger.engine.prepare import Prepared
from merger.engine.reader import PartSlices, rounded
from merger.engine.schedule import ByteProgress, Schedule, Sink
from merger.inspection.counters import TASK_VECTORS, Key, Tally, Wanted
from merger.inspection.curves import levels
from merger.inspection.report import Curve, Curves, Facts, Merged, Picture, View, curve, facts
from merger.inspection.sums import Outcome, Sums, Vectors, endings
from merger.ops.questions import Flow
from merger.pipeline.flow import Slice, Subject, flow
from merger.planning.plan import Part, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.checkpoint import Checkpoint

S = TypeVar("S", bound=Sums)
RESULT = "result"
Watch = Callable[["Tally", TensorPlan, "Tensor", Slice, Subject], Flow[None]]
"""Carries one slice of a part, whose tally it shows what there is to see."""


class Walk(Sink):
    """One inspection on its way; afterwards it says what it saw."""

    def __init__(self, prepared: Prepared, wanted: Wanted) -> None:
        self.plan, self.options = prepared.plan, prepared.options
        self.wanted = wanted
        tensors = [tensor for tensor in self.plan.tensors if tensor.stages]
        self.work = [(tensor, part, Tally(tensor, part, wanted)) for tensor in tensors for part in tensor.parts]
        self._tallies = {part.name: tally for _, part, tally in self.work}
        total = sum(self.plan.bytes_of(tensor, tensor.elements) for tensor in tensors)
        self.progress = ByteProgress("inspecting", total, self.options.progress)
        self._schedule = Schedule(prepared, tensors, self.progress)

    def run(self, watch: Watch) -> None:
        """Shows every slice to ``watch``."""
        self._watch = watch
        self._schedule.run(self)

    def carry(self, slices: PartSlices, i: int) -> Flow[None]:
        """Reads a slice, and shows it between its stages."""
        stored, piece = slices.read(i)
        tally = self._tallies[slices.part.name]
        yield from self._watch(tally, slices.tensor, stored, piece, slices.subject)
        slices.release(i)

    def end_pass(self, tensor: TensorPlan, part: Part) -> None:
        """Adds up what was counted in a pass."""
        self._tallies[part.name].fold()

    def views(self, experts: Sequence[str]) -> list[View]:
        """What was seen, in the order of the pipeline, added up by tensor, layer, projection and kind."""
        seen: dict[Key, list[tuple[TensorPlan, Vectors | Outcome]]] = defaultdict(list)
        for tensor, _, tally in self.work:
            for key, sums in tally.sums.items():
                seen[key].append((tensor, sums))
        return [_view(key, seen[key], experts) for key in sorted(seen)]

    def pictures(self, experts: Sequence[str]) -> list[Picture]:
        """Where the chosen tensor's kept positions lie, in each view of the experts; of packed experts, the first."""
        tally = next((tally for tensor, _, tally in self.work if tensor.name == self.wanted.picture), None)
        if tally is None:
            return []
        return [
            Picture(tally.part.name, key[1], dict(zip(experts, (cells / tally.cells_hold()).tolist(), strict=True)))
            for key, cells in sorted(tally.cells.items(), key=lambda item: item[0])
        ]

    def curves(self, experts: Sequence[str]) -> Curves | None:
        """The curves of the whole model and of each kind of tensor, where they were asked for."""
        seen = [(tensor, tally.curves) for tensor, _, tally in self.work if tally.curves is not None]
        if not seen:
            return None
        drawn: dict[Any, Curve] = {
            name: curve(sums, experts) for name, sums in _grouped(seen, lambda t: (None, t.kind)).items()
        }
        return Curves(whole=drawn.pop(None), kinds=drawn)


# --- what is watched ------------------------------------------------------------------------------


def between_stages(tally: Tally, tensor: TensorPlan, stored: Tensor, piece: Slice, subject: Subject) -> Flow[None]:
    """The task vectors before the recipe's stages, after each, and what becomes of them."""
    keys = stage_keys(tensor)
    yield from task_vectors(tally, tensor, stored, piece, subject)

    def look(i: int, deltas: Tensor) -> None:
        if tensor.stages[i].entry.packing is not None:
            return  # its results are of several kinds; what they hold of an expert is seen in the output
        if deltas.dim() == 3:
            tally.experts((*keys[i], "experts"), piece.row, deltas)
            return
        if i + 1 < len(keys):
            ends = endings(deltas, None, piece.deltas)
        else:
            written = rounded(tensor, tally.part, stored, piece, deltas)
            ends = endings(written, *_inputs(stored, written.dtype))
        tally.merged((*keys[i], "merged"), piece.row, deltas, piece.deltas, ends)

    yield from flow(tensor.stages, piece, subject, look)


def task_vectors(tally: Tally, tensor: TensorPlan, stored: Tensor, piece: Slice, subject: Subject) -> Flow[None]:
    """The task vectors alone."""
    yield from _task_vectors(tally, piece.row, piece.deltas)


def finished(
    merge: Checkpoint, tally: Tally, tensor: TensorPlan, stored: Tensor, piece: Slice, subject: Subject
) -> Flow[None]:
    """The task vectors, and beside them a finished ``merge``, which is the last of the experts."""
    dtype = merge.dtype(tensor.name)
    ends = endings(stored[-1].to(dtype), *_inputs(stored[:-1], dtype))
    yield from _task_vectors(tally, piece.row, piece.deltas[:-1])
    tally.merged((_LAST, RESULT, "merged"), piece.row, piece.deltas[-1], piece.deltas[:-1], ends)


def _task_vectors(tally: Tally, row: int, deltas: Tensor) -> Flow[None]:
    tally.experts(TASK_VECTORS, row, deltas)
    if tally.awaits_curves:
        tally.sweep(row, (yield from levels(deltas, tally.part.rows * tally.part.columns)))


def _inputs(stored: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Base and experts as a merge in this dtype would copy them."""
    return stored[0].to(dtype), stored[1:].to(dtype)


_LAST = (10**6, 0)


def stage_keys(tensor: TensorPlan) -> list[tuple[tuple[int, int], str]]:
    """The place and the name of the view after each stage: its own name, numbered where it comes again."""
    names = [stage.entry.name for stage in tensor.stages]
    prefix = f"rule{tensor.group}." if tensor.group else ""
    keys = []
    for i, name in enumerate(names):
        again = names[:i].count(name)
        keys.append(((tensor.group, i), f"{prefix}{name}{again + 1 if again else ''}"))
    return [*keys[:-1], (_LAST, RESULT)]


# --- adding up ------------------------------------------------------------------------------------


def _view(key: Key, seen: Sequence[tuple[TensorPlan, Vectors | Outcome]], experts: Sequence[str]) -> View:
    def grouped(group: Callable[[TensorPlan], Any]) -> dict[Any, Facts | Merged]:
        totals = _grouped(seen, lambda tensor: (group(tensor),))
        return {name: facts(sums, experts) for name, sums in totals.items()}

    cells: dict[str, dict[str, Facts | Merged]] = defaultdict(dict)
    for (layer, projection), each in grouped(lambda t: (t.unit, projection_of(t))).items():
        cells[layer][projection] = each
    return View(
        name=key[1],
        about=key[2],
        whole=grouped(lambda t: None)[None],
        kinds=grouped(lambda t: t.kind),
        layers=grouped(lambda t: t.unit),
        projections=grouped(projection_of),
        cells=dict(cells),
        tensors=grouped(lambda t: t.name),
    )


def _grouped(seen: Iterable[tuple[TensorPlan, S]], groups: Callable[[TensorPlan], Iterable[Any]]) -> dict[Any, S]:
    """Sums added up by each of the groups that a tensor belongs to."""
    totals: dict[Any, S] = {}
    for tensor, sums in seen:
        for name in groups(tensor):
            totals[name] = totals[name] + sums if name in totals else sums
    return totals


def projection_of(tensor: TensorPlan) -> str:
    """What its block calls a tensor, numbers as *: self_attn.q_proj, mlp.experts.*.w1, or all of a name outside any."""
    own = tensor.name.removeprefix(f"{tensor.unit}.").removesuffix(".weight")
    return re.sub(r"(?<![a-zA-Z_])\d+(?=\.|$)", "*", own)
