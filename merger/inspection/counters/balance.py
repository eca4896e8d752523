"""How evenly a matrix keeps its positions: over rows, columns, blocks, and in pieces for a picture.

Shapes: k experts, r rows, c columns. A position is kept where a vector is not zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from merger.ops.kernels.counting import Counts

BLOCK = 256
"""Consecutive elements of a matrix, across the ends of its rows, that make a block: the m of the CABS paper."""

CELLS = 48
"""Pieces along each side of a picture: as many as can be told apart on a page."""


class Balance:
    """How evenly one part is kept, from counts of its slices and of the blocks that these cut."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns, self.block = rows, columns, BLOCK
        self._cut: dict[int, Tensor] = {}  # [k]: what blocks keep that begin in one slice and end in another

    def add(self, first: int, stop: int, cut: Tensor) -> None:
        """Adds what the slice of elements ``first`` to ``stop`` keeps of its first and its last block: [k 2]."""
        for element, part in zip((first, stop), cut.T, strict=True):
            number, rest = divmod(element, self.block)
            if rest:
                self._cut[number] = self._cut.get(number, 0) + part

    def uneven(self, counts: Counts) -> list[Tensor | None]:
        """`unevenness` over rows, columns and blocks, [k] each, given the counts of all slices.

        None where there are fewer than two of them; a last block that is shorter is left out.
        """
        kept = counts.both.diagonal()
        whole, rest = divmod(self.rows * self.columns, self.block)
        last = self._cut.pop(whole) if rest else torch.zeros_like(kept)
        each = [
            (counts.row_squares, self.rows, kept),
            (counts.by_column.long().square().sum(1), self.columns, kept),
            (sum((own.square() for own in self._cut.values()), counts.block_squares), whole, kept - last),
        ]
        matrix = min(self.rows, self.columns) > 1
        return [unevenness(*lines) if matrix and lines[1] > 1 else None for lines in each]


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
