"""What is counted of one part of a tensor, view by view and slice by slice."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from merger._lazy import torch
from merger.checkpoint.packed_experts import ROWS
from merger.inspection.balance import CELLS, kept_by_cell
from merger.inspection.curves import Curves, curves, swept
from merger.inspection.sums import Ints, Outcome, Vectors, outcome
from merger.inspection.vector_counter import Look
from merger.planning.plan import Part, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[tuple[int, int], str, Literal["experts", "merged"]]
"""A view: its place in order, (group, stage); its name; what it is about."""

TASK_VECTORS: Key = ((-1, -1), "task_vectors", "experts")


@dataclass(frozen=True)
class Wanted:
    """What is looked at only where somebody asks for it."""

    picture: str | None = None  # of this tensor
    rank: bool = False
    curves: bool = False


class Tally:
    """What was counted of one part, by view; each slice once, however often it is shown."""

    def __init__(self, tensor: TensorPlan, part: Part, wanted: Wanted) -> None:
        self.part = part
        self.sums: dict[Key, Vectors | Outcome] = {}
        self.cells: dict[Key, Tensor] = {}
        self.curves: Curves | None = None
        self.awaits_curves = wanted.curves
        self._lying = part.input_axis == ROWS  # its rows are what others have as columns
        self._wanted = wanted
        self._pictured = tensor.name == wanted.picture
        self._looks: dict[Key, Look] = {}
        self._outcomes: dict[Key, dict[int, Outcome]] = defaultdict(dict)  # by the slice's first row
        self._swept: dict[int, tuple[Any, Any]] = {}
        self._lock = Lock()

    def experts(self, key: Key, row: int, deltas: Tensor) -> None:
        """Counts the task vectors [k r c] of the slice that begins at ``row``."""
        if key in self.sums:
            return
        with self._lock:
            if key not in self._looks:
                ranked = self._wanted.rank and key == TASK_VECTORS
                self._looks[key] = Look(len(deltas), self.part.rows, self.part.columns, ranked=ranked)
            look = self._looks[key]
        if look.has(row):
            return
        look.add(row, deltas)
        if self._pictured:
            cells = kept_by_cell(deltas, row, self.part.rows, CELLS)
            with self._lock:
                self.cells[key] = cells + self.cells[key] if key in self.cells else cells

    def sweep(self, row: int, kept: Any) -> None:
        """Counts `levels` of the slice that begins at ``row``."""
        self._swept[row] = swept(kept)

    def merged(self, key: Key, row: int, delta: Tensor, deltas: Tensor, ends: Ints) -> None:
        """Counts a merged task vector [r c] beside those that it was made of."""
        if key not in self.sums and row not in self._outcomes[key]:
            self._outcomes[key][row] = outcome(delta, deltas, ends)

    def fold(self) -> None:
        """Adds the slices up; all those that a view has, for a pass shows all slices or none."""
        for key in list(self._looks):
            look = self._looks.pop(key)
            self.sums[key] = total = look.vectors(lying=self._lying)
            if key == TASK_VECTORS and self._swept:
                held = look.counts().row_squares
                self.curves = curves(self._swept.values(), total, held, self.part.rows, self.part.columns)
                self._swept = {}
                self.awaits_curves = False
        for key in [key for key, slices in self._outcomes.items() if slices]:
            slices = self._outcomes.pop(key)
            own = self.sums[TASK_VECTORS]  # which every watch shows first
            assert isinstance(own, Vectors)
            squares = tuple(own.products[k][k] for k in range(len(own.products)))
            self.sums[key] = replace(reduce(add, (slices[row] for row in sorted(slices))), squares=squares)

    def cells_hold(self) -> Tensor:
        """How many elements each piece of a picture has."""
        whole = torch.ones(1, 1, self.part.columns)
        across = kept_by_cell(whole, 0, 1, CELLS)[0]
        down = kept_by_cell(torch.ones(1, 1, self.part.rows), 0, 1, CELLS)[0]
        return down.T * across
