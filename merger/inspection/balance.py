"""How evenly a matrix keeps its positions: over rows, columns, blocks, and in pieces for a picture.

Shapes: k experts, r rows, c columns. A position is kept where a vector is not zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.kernels import counting

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 256
"""Consecutive elements of a matrix, across the ends of its rows, that make a block: the m of the CABS paper."""

CELLS = 48
"""Pieces along each side of a picture: as many as can be told apart on a page."""


class Balance:
    """What one part's rows, columns and blocks keep, added up slice by slice in any order."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.row_squares = torch.zeros(experts, dtype=torch.int64)  # of what each row keeps
        self._block_squares = torch.zeros(experts, dtype=torch.int64)
        self._by_column = torch.zeros(experts, columns, dtype=torch.int64)
        self._cut: dict[int, Tensor] = {}  # [k]: what blocks keep that begin in one slice and end in another

    def add(self, row: int, counts: Lines) -> None:
        """Adds what `lines` counted in the slice that begins at ``row``."""
        by_row, by_column, by_block = (each.long() for each in counts)
        self.row_squares += by_row.square().sum(1)
        self._block_squares += by_block.square().sum(1)
        self._by_column += by_column
        first, end = row * self.columns, (row + by_row.shape[1]) * self.columns
        for block in {each // BLOCK for each in (first, end) if each % BLOCK}:
            part = by_block[:, block - first // BLOCK]
            self._block_squares -= part.square()
            self._cut[block] = self._cut[block] + part if block in self._cut else part

    def uneven(self, kept: Tensor) -> list[Tensor | None]:
        """`unevenness` over rows, columns and blocks, [k] each, given what is ``kept`` [k] of the whole.

        None where there are fewer than two of them; a last block that is shorter is left out.
        """
        whole, rest = divmod(self.rows * self.columns, BLOCK)
        last = self._cut.pop(whole) if rest else torch.zeros_like(kept)
        cut = sum((each.square() for each in self._cut.values()), self._block_squares)
        each = [
            (self.row_squares, self.rows, kept),
            (self._by_column.square().sum(1), self.columns, kept),
            (cut, whole, kept - last),
        ]
        matrix = min(self.rows, self.columns) > 1
        return [unevenness(*lines) if matrix and lines[1] > 1 else None for lines in each]


Lines = tuple["Tensor", "Tensor", "Tensor"]
"""What each row [k r], column [k c] and block [k b] of a slice keeps; its first and its last block may be cut."""


def lines(deltas: Tensor, row: int) -> Lines:
    """Counts the slice [k r c] of a matrix that begins at ``row``."""
    return counting.of(deltas).lines(deltas, row * deltas.shape[2] % BLOCK, BLOCK)


def unevenness(squares: Tensor, lines: int, total: Tensor) -> Tensor:
    """Standard deviation over mean of what ``lines`` rows, columns or blocks keep: 0 where all keep alike.

    ``squares`` [k] is the sum of their squared counts, ``total`` [k] of the counts. Random masks of density p
    over c columns have sqrt((1 - p) / (p c)) over their rows; a vector that keeps nothing has 0.
    """
    mean_square = total.double().square().clamp(min=1) / lines
    return (squares.double() / mean_square - 1).clamp(min=0).sqrt().where(total > 0, 0)


def kept_by_cell(deltas: Tensor, first: int, rows: int, cells: int) -> Tensor:
    """How many positions are kept in each of ``cells`` x ``cells`` pieces of a matrix, in some of its rows: [k y x].

    ``first`` is the slice's first row and ``rows`` the matrix's; a smaller matrix has a piece for each element.
    """
    k, r, c = deltas.shape
    high, wide = min(cells, rows), min(cells, c)
    down = torch.arange(first, first + r) * high // rows
    across = torch.arange(c) * wide // c
    kept = (deltas != 0).cpu().double()
    by_column = torch.zeros(k, r, wide, dtype=torch.float64).index_add_(2, across, kept)
    return torch.zeros(k, high, wide, dtype=torch.float64).index_add_(1, down, by_column).long()
