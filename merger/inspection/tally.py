"""What is counted of one part of a tensor, view by view and slice by slice."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import reduce
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from merger._lazy import torch
from merger.inspection.balance import CELLS, Balance, kept_by_cell, lines
from merger.inspection.curves import Curves, curves, swept
from merger.inspection.measures import Ints, Outcome, Vectors, outcome, vectors
from merger.inspection.ranks import Spectra
from merger.inspection.values import Values
from merger.planning import Part, TensorPlan

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
    """What was counted of one part, by view: whole numbers added as they come, others in the order of slices."""

    def __init__(self, tensor: TensorPlan, part: Part, wanted: Wanted) -> None:
        self.part = part
        self.sums: dict[Key, Vectors | Outcome] = {}
        self.cells: dict[Key, Tensor] = {}
        self.curves: Curves | None = None
        self.awaits_curves = wanted.curves
        self._lying = tensor.kind == "conv1d" and not part.transposed  # its rows are what others have as columns
        self._wanted = wanted
        self._pictured = tensor.name == wanted.picture
        self._slices: dict[Key, dict[int, Vectors | Outcome]] = defaultdict(dict)
        self._wholes: dict[Key, _Whole] = {}
        self._swept: dict[int, tuple[Any, Any]] = {}
        self._lock = Lock()

    def experts(self, key: Key, row: int, deltas: Tensor) -> None:
        """Counts the task vectors [k r c] of the slice that begins at ``row``, once however often it is shown."""
        if key in self.sums or row in self._slices[key]:
            return
        with self._lock:
            if key not in self._wholes:
                ranked = self._wanted.rank and key == TASK_VECTORS
                self._wholes[key] = _Whole(len(deltas), self.part, ranked=ranked)
            whole = self._wholes[key]
        counted, kept, values = vectors(deltas), lines(deltas, row), whole.values.different(deltas)
        spectra = None if whole.spectra is None else whole.spectra.part(deltas)
        cells = kept_by_cell(deltas, row, self.part.rows, CELLS) if self._pictured else None
        with self._lock:
            self._slices[key][row] = counted
            whole.balance.add(row, kept)
            whole.values.add(values)
            if whole.spectra is not None and spectra is not None:
                whole.spectra.add(row, deltas.shape[1], spectra)
            if cells is not None:
                self.cells[key] = cells + self.cells[key] if key in self.cells else cells

    def sweep(self, row: int, kept: Any) -> None:
        """Counts `levels` of the slice that begins at ``row``."""
        self._swept[row] = swept(kept)

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
            if isinstance(total, Vectors):
                self.sums[key] = self._completed(key, total)
            else:
                own = self.sums[TASK_VECTORS]  # which every watch shows first
                assert isinstance(own, Vectors)
                squares = tuple(own.products[k][k] for k in range(len(own.products)))
                self.sums[key] = replace(total, squares=squares)

    def _completed(self, key: Key, total: Vectors) -> Vectors:
        """The sums with what only a whole tensor has: balance, different values, rank."""
        whole, part = self._wholes.pop(key), self.part
        if key == TASK_VECTORS and self._swept:
            self.curves = curves(self._swept.values(), total, whole.balance.row_squares, part.rows, part.columns)
            self._swept = {}
            self.awaits_curves = False
        found = whole.balance.uneven(torch.tensor(total.both).diagonal())
        in_order = [found[1], found[0], found[2]] if self._lying else found
        ranks = None if whole.spectra is None else whole.spectra.effective()
        nothing = (0.0,) * len(total.distinct)
        return replace(
            total,
            uneven=tuple(nothing if each is None else _times(each, total.elements) for each in in_order),
            in_matrices=tuple(0 if each is None else total.elements for each in in_order),
            distinct=whole.values.count(),
            ranks=nothing if ranks is None else _times(ranks, total.elements),
            ranked=0 if ranks is None else total.elements,
        )

    def cells_hold(self) -> Tensor:
        """How many elements each piece of a picture has."""
        whole = torch.ones(1, 1, self.part.columns)
        across = kept_by_cell(whole, 0, 1, CELLS)[0]
        down = kept_by_cell(torch.ones(1, 1, self.part.rows), 0, 1, CELLS)[0]
        return down.T * across


class _Whole:
    """What one view knows of a part as a whole while its slices come in."""

    def __init__(self, experts: int, part: Part, *, ranked: bool) -> None:
        self.balance = Balance(experts, part.rows, part.columns)
        self.values = Values(experts)
        matrix = min(part.rows, part.columns) > 1
        self.spectra = Spectra(experts, part.rows, part.columns) if ranked and matrix else None


def _added(one: Vectors | Outcome, other: Vectors | Outcome) -> Vectors | Outcome:
    assert type(one) is type(other), "a view is about one kind of thing"
    return one + other  # type: ignore[operator]


def _times(values: Tensor, elements: int) -> tuple[float, ...]:
    return tuple((values * elements).tolist())
