"""What is counted of one part of a tensor, view by view and slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

from merger.checkpoint.packed_experts import ROWS
from merger.inspection.counters import Counter, ExpertSlice, MatrixShape, MergedSlice, SumsByCounter
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.curves import CurveSums, LevelCounts, count_levels, sum_curves
from merger.inspection.density_map import elements_by_cell, positions_by_cell
from merger.inspection.request import TASK_VECTORS, InspectionRequest, ViewKey
from merger.inspection.statistic import statistics
from merger.planning.plan import Part, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor


class ViewCounters:
    """The counters of one part in one view."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = counters
        self._rows: set[int] = set()
        self._lock = Lock()

    def has(self, row: int) -> bool:
        """Whether the slice that begins at ``row`` was counted."""
        return row in self._rows

    def count(self, piece: ExpertSlice | MergedSlice) -> None:
        """Counts a slice; several threads may count different slices at the same time."""
        measurements = [counter.measure(piece) for counter in self._counters]
        with self._lock:
            self._rows.add(piece.row)
            for counter, measurement in zip(self._counters, measurements, strict=True):
                counter.add(piece, measurement)

    def sums(self) -> SumsByCounter:
        """The sums of all slices."""
        return {type(counter): counter.sums() for counter in self._counters}


class PartCounts:
    """The counts of one part in every view; each slice is counted once, however often a pass shows it."""

    def __init__(self, tensor: TensorPlan, part: Part, request: InspectionRequest) -> None:
        self.part = part
        self.sums: dict[ViewKey, SumsByCounter] = {}
        self.cells: dict[ViewKey, Tensor] = {}  # positions in each cell of a density map [k y x]
        self.curves: CurveSums | None = None
        self.needs_levels = request.curves
        self._neurons_in_columns = part.input_axis == ROWS
        self._request = request
        self._is_mapped = tensor.name == request.picture
        self._open: dict[ViewKey, ViewCounters] = {}
        self._levels: dict[int, LevelCounts] = {}  # by a slice's first row
        self._lock = Lock()

    def has(self, view: ViewKey, row: int) -> bool:
        """Whether a view has counted the slice that begins at ``row``."""
        return view in self.sums or (view in self._open and self._open[view].has(row))

    def count(self, view: ViewKey, piece: ExpertSlice | MergedSlice) -> None:
        """Counts a slice in a view, unless the view has counted it."""
        if self.has(view, piece.row):
            return
        with self._lock:
            if view not in self._open:
                self._open[view] = ViewCounters(self._counters(view, len(piece.deltas)))
            counters = self._open[view]
        counters.count(piece)
        if self._is_mapped and isinstance(piece, ExpertSlice):
            cells = positions_by_cell(piece.deltas, piece.row, self.part.rows)
            with self._lock:
                self.cells[view] = cells + self.cells[view] if view in self.cells else cells

    def count_levels(self, row: int, levels: Tensor) -> None:
        """Counts the `selection_levels` of the slice that begins at ``row``."""
        self._levels[row] = count_levels(levels)

    def close_views(self) -> None:
        """Adds the slices of each view up; a pass shows all slices of a view, or none."""
        for view in sorted(self._open):
            sums = self._open.pop(view).sums()
            self.sums[view] = {**self._task_vector_sums(view), **sums}
        if self._levels:
            vectors = self.sums[TASK_VECTORS][VectorCounter]
            assert isinstance(vectors, VectorSums)
            self.curves = sum_curves(self._levels.values(), vectors, self.part.rows, self.part.columns)
            self._levels = {}
            self.needs_levels = False

    def density_by_cell(self, view: ViewKey) -> list[list[list[float]]]:
        """The density of each cell [k y x] in a view."""
        by_cell: list[list[list[float]]] = (
            self.cells[view] / elements_by_cell(self.part.rows, self.part.columns)
        ).tolist()
        return by_cell

    def _counters(self, view: ViewKey, experts: int) -> list[Counter]:
        shape = MatrixShape(experts, self.part.rows, self.part.columns, self._neurons_in_columns)
        return [counter(shape) for counter in self._request.counters(view)]

    def _task_vector_sums(self, view: ViewKey) -> SumsByCounter:
        """The sums of the task vectors that the statistics of a merged vector need; every walk shows these first."""
        if view.subject == "experts":
            return {}
        needed = {counter for entry in statistics("merged") for counter in entry.counters}
        return {counter: sums for counter, sums in self.sums[TASK_VECTORS].items() if counter in needed}
