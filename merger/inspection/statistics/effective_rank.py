"""The effective rank of task vectors, from the Gram matrix of a matrix's smaller side, gathered slice by slice.

Effective rank: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007: e to
the entropy of the singular values as shares of their sum.

Shapes: k experts, r rows, c columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Spectra:
    """Task vectors of one matrix on their way to their singular values.

    A tall matrix is added up as the Gram matrix [c c] of its columns; of a wide one all rows are needed at
    once, so it is kept as it is. Either is the smaller of the two that would do.
    """

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self._tall = rows >= columns
        shape = (experts, columns, columns) if self._tall else (experts, rows, columns)
        self._whole = torch.zeros(shape, dtype=torch.float64 if self._tall else torch.float32)
        self._next = 0
        self._early: dict[int, tuple[int, Tensor]] = {}  # by first row: how many there are, and their Gram matrices

    def part(self, deltas: Tensor) -> Tensor:
        """What is added for some rows [k r c]."""
        if not self._tall:
            return deltas
        wide = deltas.double()
        return (wide.transpose(1, 2) @ wide).cpu()

    def add(self, row: int, rows: int, part: Tensor) -> None:
        """Adds the `part` of ``rows`` rows from ``row`` on; in the order of rows, that no sum depends on threads."""
        if not self._tall:
            self._whole[:, row : row + rows] = part
            return
        self._early[row] = rows, part
        while self._next in self._early:
            more, gram = self._early.pop(self._next)
            self._whole += gram
            self._next += more

    def effective(self) -> Tensor:
        """The effective rank of each expert's matrix [k], 0 of one that is zero."""
        return torch.stack([effective_rank(self._values(each)) for each in self._whole])

    def _values(self, whole: Tensor) -> Tensor:
        wide = whole.double()
        squares: Tensor = torch.linalg.eigvalsh(wide if self._tall else wide @ wide.T)
        values = squares.clamp(min=0).sqrt()
        least = (
            max(self.rows, self.columns) * 2.0**-23 * float(values.max())
        )  # as in merger.ops.linalg: less is rounding
        return values.where(values > least, 0)


def effective_rank(values: Tensor) -> Tensor:
    """e to the entropy of singular values [n] as shares of their sum; 0 where all are 0."""
    total = values.sum()
    if total == 0:
        return total
    shares = values[values > 0] / total
    return (-(shares * shares.log()).sum()).exp()
