"""The walk over all tensors: each slice is read, carried through the stages, and counted between them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from merger._lazy import torch
from merger.calibration.statistics import Statistics
from merger.engine.machine import Machine, tuned
from merger.engine.reader import Reader, rounded
from merger.inspection.counters import TASK_VECTORS, Key, Tally, Wanted
from merger.inspection.curves import levels
from merger.inspection.report import Curve, Curves, Facts, Merged, Picture, View, curve, facts
from merger.inspection.sums import Outcome, Sums, Vectors, endings
from merger.ops.questions import Flow
from merger.pipeline.flow import Slice, Subject, flow
from merger.pipeline.passes import EarlierSums, ModelTotals, OpenTotal, run_tensors
from merger.planning.plan import Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.checkpoint import Checkpoint

S = TypeVar("S", bound=Sums)
RESULT = "result"
Blocks = Iterable[tuple[list[TensorPlan], Mapping[str, Statistics]]]
"""Tensors that take Gram matrices, and these, as `statistics.grams` gives them."""
Watch = Callable[["Tally", TensorPlan, "Tensor", Slice, Subject], Flow[None]]
"""Carries one slice of a part, whose tally it shows what there is to see."""


class Walk:
    """One inspection on its way; afterwards it says what it saw."""

    def __init__(
        self,
        plan: Plan,
        machine: Machine,
        statistics: Mapping[str, Statistics],
        *,
        notice: Callable[[str], None],
        progress: Callable[[str, int, int], None],
        wanted: Wanted,
    ) -> None:
        self.plan, self.machine, self.statistics = plan, machine, statistics
        self.notice, self.tell = notice, progress
        self.wanted = wanted
        self.work = [
            (tensor, part, Tally(tensor, part, wanted))
            for tensor in plan.tensors
            if tensor.stages
            for part in tensor.parts
        ]
        self.lock = Lock()
        self.done_bytes = 0
        self.total_bytes = sum(plan.bytes_of(t, part.rows * part.columns) for t, part, _ in self.work)

    def run(self, watch: Watch, blocks: Blocks = ()) -> None:
        """Visits every tensor until nothing is left to see; what takes Gram matrices, as ``blocks`` brings them."""
        with ThreadPoolExecutor(self.machine.workers, "merger-slice") as slices:
            reader = Reader(
                self.plan, self.machine, self.statistics, lambda _, message: self.notice(message), slices.map
            )
            try:
                self._settle(reader, watch, [tensor for tensor in self.plan.tensors if not tensor.gram])
                for ready, statistics in blocks:
                    self._settle(replace(reader, statistics=statistics), watch, ready)
            except BaseException:
                slices.shutdown(wait=False, cancel_futures=True)
                raise

    def _settle(self, reader: Reader, watch: Watch, tensors: Iterable[TensorPlan]) -> None:
        names = {tensor.name for tensor in tensors}
        work = [each for each in self.work if each[0].name in names]
        with tuned():
            run_tensors(
                [t.group for t, *_ in work],
                lambda i, model_totals, earlier_sums: self._visit(reader, watch, *work[i], model_totals, earlier_sums),
            )

    def _visit(
        self,
        reader: Reader,
        watch: Watch,
        tensor: TensorPlan,
        part: Part,
        tally: Tally,
        model_totals: ModelTotals,
        earlier_sums: EarlierSums,
    ) -> OpenTotal | None:
        question = reader.visit(tensor, part, model_totals, earlier_sums, partial(watch, tally, tensor))
        tally.fold()
        size = self.plan.bytes_of(tensor, part.rows * part.columns)
        with self.lock:
            self.done_bytes += size
            self.total_bytes += 0 if question is None else size
            self.tell("inspecting", self.done_bytes, self.total_bytes)
        return question

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
