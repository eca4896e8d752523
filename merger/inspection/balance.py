"""How evenly a matrix keeps its positions: over rows, columns, blocks, and in pieces for a picture.

Shapes: k experts, r rows, c columns. A position is kept where a vector is not zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch

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

    def add(self, counts: Lines) -> None:
        """Adds a slice."""
        self.row_squares += counts.rows.square().sum(1)
        self._block_squares += counts.blocks.square().sum(1)
        self._by_column += counts.columns
        for block, kept in counts.cut:
            self._cut[block] = kept + self._cut[block] if block in self._cut else kept

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


class Lines:
    """What the lines of one slice keep, which begins at element ``first`` of its matrix."""

    def __init__(self, deltas: Tensor, first: int) -> None:
        import numpy

        kept = deltas.cpu().numpy() != 0
        k, rows, _ = kept.shape
        by_row = numpy.bitwise_count(numpy.packbits(kept, axis=2)).sum(2, dtype="int64")
        by_column = sum(kept[:, i : i + 255].sum(1, dtype="uint8").astype("int64") for i in range(0, rows, 255))
        flat = kept.reshape(k, -1)
        head = min(-first % BLOCK, flat.shape[1])
        tail = (flat.shape[1] - head) // BLOCK * BLOCK + head
        bits = numpy.packbits(flat[:, head:tail], axis=1).reshape(k, -1, BLOCK // 8)
        self.rows = torch.from_numpy(by_row)  # [k r]
        self.columns = torch.from_numpy(by_column)  # [k c]
        self.blocks = torch.from_numpy(numpy.bitwise_count(bits).sum(2, dtype="int64"))  # [k b]: whole ones
        ends = [(first, flat[:, :head]), (first + tail, flat[:, tail:])]
        self.cut = [(start // BLOCK, torch.from_numpy(part.sum(1))) for start, part in ends if part.size]


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
