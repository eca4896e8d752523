"""A look at several task vectors of one part, whose slices come in any order and side by side."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any

from merger.inspection.balance import Balance
from merger.inspection.ranks import Spectra
from merger.inspection.sums import Vectors
from merger.inspection.values import Values
from merger.ops.kernels import counting
from merger.ops.kernels.counting import Counts

if TYPE_CHECKING:
    from torch import Tensor


class Look:
    """Counts task vectors slice by slice: whole numbers as they come, what is made of floats in the slices' order."""

    def __init__(self, experts: int, rows: int, columns: int, *, ranked: bool = False) -> None:
        self.rows, self.columns = rows, columns
        self._none = Counts.none(experts, columns)
        self._idle: list[Counts] = []  # one for each thread that has counted, but those that do now
        self._products: dict[int, list[list[float]]] = {}  # by a slice's first row
        self._balance = Balance(rows, columns)
        self._values = Values(experts, rows * columns)
        matrix = min(rows, columns) > 1
        self._spectra = Spectra(experts, rows, columns) if ranked and matrix else None
        self._lock = Lock()

    def has(self, row: int) -> bool:
        """Whether the slice that begins at ``row`` was counted."""
        return row in self._products

    def add(self, row: int, deltas: Tensor) -> None:
        """Counts the slice [k r c] that begins at ``row``."""
        first, stop = row * self.columns, (row + deltas.shape[1]) * self.columns
        products, cut = self._counted(deltas, first)
        values = self._values.different(deltas)
        spectra = None if self._spectra is None else self._spectra.part(deltas)
        with self._lock:
            self._products[row] = products.tolist()
            self._balance.add(first, stop, cut)
            self._values.add(values)
            if self._spectra is not None and spectra is not None:
                self._spectra.add(row, deltas.shape[1], spectra)

    def _counted(self, deltas: Tensor, first: int) -> tuple[Tensor, Tensor]:
        try:
            mine = self._idle.pop()
        except IndexError:
            mine = self._none + self._none
        size = self._balance.block
        found = counting.of(deltas).vectors(deltas, first % size, size, mine)
        self._idle.append(mine)
        return found

    def counts(self) -> Counts:
        """What all slices together have."""
        return sum(self._idle, self._none)

    def vectors(self, *, lying: bool = False) -> Vectors:
        """All that was seen; where the part lies, its rows are what other tensors have as columns."""
        import numpy

        counts, elements = self.counts(), self.rows * self.columns
        k = len(counts.both)
        in_order = numpy.array([self._products[row] for row in sorted(self._products)])
        rows, columns, blocks = self._balance.uneven(counts)
        uneven = (columns, rows, blocks) if lying else (rows, columns, blocks)
        ranks = None if self._spectra is None else self._spectra.effective()
        return Vectors(
            elements=elements,
            both=_plain(counts.both),
            opposed=_plain(counts.opposed),
            holders=_plain(counts.holders),
            products=_plain(in_order.cumsum(0)[-1]),
            uneven=tuple(_times(each, elements, k) for each in uneven),
            in_matrices=tuple(0 if each is None else elements for each in uneven),
            distinct=self._values.count(),
            ranks=_times(ranks, elements, k),
            ranked=0 if ranks is None else elements,
        )


def _times(values: Tensor | None, elements: int, k: int) -> tuple[float, ...]:
    return (0.0,) * k if values is None else tuple((values * elements).tolist())


def _plain(values: Any) -> Any:
    """An array or a tensor as numbers in tuples."""
    return tuple(tuple(each) if isinstance(each, list) else each for each in values.tolist())
