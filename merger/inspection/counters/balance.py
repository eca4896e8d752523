"""How evenly a matrix holds its positions: over rows, columns and blocks.

Shapes: k experts, r rows, c columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from merger.ops.kernels.counting import Counts

BLOCK = 256
"""Consecutive elements of a matrix, across the ends of its rows, that make a block: the m of the CABS paper."""


class Balance:
    """The unevenness of one matrix, from counts of its slices and of the blocks that lie in two slices."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns, self.block = rows, columns, BLOCK
        self._split_blocks: dict[int, Tensor] = {}  # [k] positions, by the block's number

    def add(self, start: int, stop: int, ends: Tensor) -> None:
        """Adds the positions of the first and the last block of a slice [k 2], which is elements start to stop."""
        for element, positions in zip((start, stop), ends.T, strict=True):
            number, offset = divmod(element, self.block)
            if offset:
                self._split_blocks[number] = self._split_blocks.get(number, 0) + positions

    def unevenness(self, counts: Counts) -> list[Tensor | None]:
        """`unevenness` over rows, columns and blocks [k], given the counts of all slices.

        None where there are fewer than two rows, columns or blocks. A shorter last block is left out.
        """
        totals = counts.joint.diagonal()
        blocks, tail = divmod(self.rows * self.columns, self.block)
        tail_positions = self._split_blocks.pop(blocks) if tail else torch.zeros_like(totals)
        block_squares = sum((block.square() for block in self._split_blocks.values()), counts.block_squares)
        lines = [
            (counts.row_squares, self.rows, totals),
            (counts.by_column.long().square().sum(1), self.columns, totals),
            (block_squares, blocks, totals - tail_positions),
        ]
        is_matrix = min(self.rows, self.columns) > 1
        return [unevenness(*line) if is_matrix and line[1] > 1 else None for line in lines]


def unevenness(squares: Tensor, lines: int, total: Tensor) -> Tensor:
    """Standard deviation over mean of the positions of each of ``lines`` rows, columns or blocks; 0 for equal ones.

    ``squares`` [k] is the sum of their squared counts, ``total`` [k] of the counts. Random masks of density p
    over c columns have sqrt((1 - p) / (p c)) over their rows; an expert without positions has 0.
    """
    mean_square = total.double().square().clamp(min=1) / lines
    return (squares.double() / mean_square - 1).clamp(min=0).sqrt().where(total > 0, 0)
