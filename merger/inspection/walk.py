"""The walk over all tensors: each slice is read, carried through the stages, and counted between them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, reduce
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from merger._lazy import torch
from merger.inspection.facts import Facts, Merged, Picture, View, facts
from merger.inspection.measures import (
    Ints,
    Outcome,
    Vectors,
    endings,
    kept_by_cell,
    kept_by_line,
    outcome,
    unevenness,
    vectors,
)
from merger.machine import Machine, tuned
from merger.ops import Flow, Max, Sum
from merger.passes import Ahead, settle
from merger.pipeline import Slice, Subject, flow
from merger.planning import Part, Plan, TensorPlan
from merger.reading import Reader, rounded
from merger.statistics import Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.stored import Checkpoint

CELLS = 48
"""Pieces along each side of a picture: as many as can be told apart on a page."""

TASK_VECTORS, RESULT = "task_vectors", "result"
Key = tuple[tuple[int, int], str, Literal["experts", "merged"]]
"""A view: its place in order, (group, stage); its name; what it is about."""
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
        picture: str | None = None,
    ) -> None:
        self.plan, self.machine, self.statistics = plan, machine, statistics
        self.notice, self.tell = notice, progress
        self.picture = picture
        self.work = [
            (tensor, part, Tally(part, tensor.kind, tensor.name == picture))
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
            settle(
                [t.group for t, *_ in work],
                lambda i, known, ahead: self._visit(reader, watch, *work[i], known, ahead),
            )

    def _visit(
        self,
        reader: Reader,
        watch: Watch,
        tensor: TensorPlan,
        part: Part,
        tally: Tally,
        known: Sequence[Any],
        ahead: Ahead,
    ) -> Sum | Max | None:
        question = reader.visit(tensor, part, known, ahead, partial(watch, tally, tensor))
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
        tally = next((tally for tensor, _, tally in self.work if tensor.name == self.picture), None)
        if tally is None:
            return []
        return [
            Picture(tally.part.name, key[1], dict(zip(experts, (cells / tally.cells_hold()).tolist(), strict=True)))
            for key, cells in sorted(tally.cells.items(), key=lambda item: item[0])
        ]


class Tally:
    """What was counted of one part, by view: whole numbers added as they come, others in the order of slices."""

    def __init__(self, part: Part, kind: str, pictured: bool) -> None:
        self.part = part
        self.lying = kind == "conv1d" and not part.transposed  # its rows are what others have as columns
        self.pictured = pictured
        self.sums: dict[Key, Vectors | Outcome] = {}
        self.cells: dict[Key, Tensor] = {}
        self._slices: dict[Key, dict[int, Vectors | Outcome]] = defaultdict(dict)
        self._rows: dict[Key, Tensor] = {}  # [k]: squares of what each row keeps
        self._columns: dict[Key, Tensor] = {}  # [k c]: what each column keeps
        self._lock = Lock()

    def experts(self, key: Key, row: int, deltas: Tensor) -> None:
        """Counts the task vectors [k r c] of the slice that begins at ``row``, once however often it is shown."""
        if key in self.sums or row in self._slices[key]:
            return
        counted = vectors(deltas)
        by_row, by_column = kept_by_line(deltas)
        cells = kept_by_cell(deltas, row, self.part.rows, CELLS) if self.pictured else None
        with self._lock:
            self._slices[key][row] = counted
            _add(self._rows, key, by_row.square().sum(1))
            _add(self._columns, key, by_column)
            if cells is not None:
                _add(self.cells, key, cells)

    def merged(self, key: Key, row: int, delta: Tensor, deltas: Tensor, ends: Ints) -> None:
        """Counts a merged task vector [r c] beside those that it was made of."""
        if key not in self.sums and row not in self._slices[key]:
            counted = outcome(delta, deltas, ends)
            with self._lock:
                self._slices[key][row] = counted

    def fold(self) -> None:
        """Adds the slices up; all those that a view has, for a pass shows all slices or none."""
        for key in [key for key, slices in self._slices.items() if slices]:
            slices = self._slices.pop(key)
            total = reduce(_added, (slices[row] for row in sorted(slices)))
            self.sums[key] = self._balanced(key, total) if isinstance(total, Vectors) else total

    def _balanced(self, key: Key, total: Vectors) -> Vectors:
        rows, columns = self.part.rows, self.part.columns
        by_row, by_column = self._rows.pop(key), self._columns.pop(key).square().sum(1)
        if min(rows, columns) < 2:
            return total
        kept = torch.tensor(total.both).diagonal()
        uneven = (unevenness(by_row, rows, kept), unevenness(by_column, columns, kept))
        in_order = uneven[::-1] if self.lying else uneven
        weighted = tuple(tuple((each * total.elements).tolist()) for each in in_order)
        return replace(total, uneven=weighted, in_matrices=total.elements)

    def cells_hold(self) -> Tensor:
        """How many elements each piece of a picture has."""
        whole = torch.ones(1, 1, self.part.columns)
        across = kept_by_cell(whole, 0, 1, CELLS)[0]
        down = kept_by_cell(torch.ones(1, 1, self.part.rows), 0, 1, CELLS)[0]
        return down.T * across


def _add(sums: dict[Key, Tensor], key: Key, more: Tensor) -> None:
    if key in sums:
        sums[key] += more
    else:
        sums[key] = more


# --- what is watched ------------------------------------------------------------------------------


def between_stages(tally: Tally, tensor: TensorPlan, stored: Tensor, piece: Slice, subject: Subject) -> Flow[None]:
    """The task vectors before the recipe's stages, after each, and what becomes of them."""
    keys = stage_keys(tensor)
    tally.experts(((-1, -1), TASK_VECTORS, "experts"), piece.row, piece.deltas)

    def look(i: int, deltas: Tensor) -> None:
        if tensor.stages[i].entry.packing is not None:
            return  # its results are of several kinds; what they hold of an expert is seen in the output
        if deltas.dim() == 3:
            tally.experts((*keys[i], "experts"), piece.row, deltas)
            return
        if i + 1 < len(keys):
            ends = endings(deltas, torch.zeros_like(deltas), piece.deltas)
        else:
            written = rounded(tensor, tally.part, stored, piece, deltas)
            ends = endings(written, *_inputs(stored, written.dtype))
        tally.merged((*keys[i], "merged"), piece.row, deltas, piece.deltas, ends)

    yield from flow(tensor.stages, piece, subject, look)


def task_vectors(tally: Tally, tensor: TensorPlan, stored: Tensor, piece: Slice, subject: Subject) -> Flow[None]:
    """The task vectors alone."""
    tally.experts(((-1, -1), TASK_VECTORS, "experts"), piece.row, piece.deltas)
    yield from ()


def finished(
    merge: Checkpoint, tally: Tally, tensor: TensorPlan, stored: Tensor, piece: Slice, subject: Subject
) -> Flow[None]:
    """The task vectors, and beside them a finished ``merge``, which is the last of the experts."""
    dtype = merge.dtype(tensor.name)
    ends = endings(stored[-1].to(dtype), *_inputs(stored[:-1], dtype))
    tally.experts(((-1, -1), TASK_VECTORS, "experts"), piece.row, piece.deltas[:-1])
    tally.merged((_LAST, RESULT, "merged"), piece.row, piece.deltas[-1], piece.deltas[:-1], ends)
    yield from ()


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
        totals: dict[Any, Vectors | Outcome] = {}
        for tensor, sums in seen:
            name = group(tensor)
            totals[name] = _added(totals[name], sums) if name in totals else sums
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


def _added(one: Vectors | Outcome, other: Vectors | Outcome) -> Vectors | Outcome:
    assert type(one) is type(other), "a view is about one kind of thing"
    return one + other  # type: ignore[operator]


def projection_of(tensor: TensorPlan) -> str:
    """What its block calls a tensor, numbers as *: self_attn.q_proj, mlp.experts.*.w1, or all of a name outside any."""
    own = tensor.name.removeprefix(f"{tensor.unit}.").removesuffix(".weight")
    return re.sub(r"(?<![a-zA-Z_])\d+(?=\.|$)", "*", own)
