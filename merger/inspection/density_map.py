"""A map of where one matrix holds its positions, in equal cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

CELLS = 48
"""Cells along each side of a map: as many as can be told apart on a page."""


def positions_by_cell(deltas: Tensor, first_row: int, rows: int, cells: int = CELLS) -> Tensor:
    """Positions that are not zero in each of ``cells`` x ``cells`` cells of a matrix, in a slice [k r c]: [k y x].

    ``first_row`` is the slice's first row and ``rows`` the matrix's; a smaller matrix has a cell for each element.
    """
    k, r, c = deltas.shape
    height, width = min(cells, rows), min(cells, c)
    down = torch.arange(first_row, first_row + r) * height // rows
    across = torch.arange(c) * width // c
    support = (deltas != 0).cpu().double()
    by_column = torch.zeros(k, r, width, dtype=torch.float64).index_add_(2, across, support)
    return torch.zeros(k, height, width, dtype=torch.float64).index_add_(1, down, by_column).long()


def elements_by_cell(rows: int, columns: int) -> Tensor:
    """Elements of each cell of a matrix: [y x]."""
    across = positions_by_cell(torch.ones(1, 1, columns), 0, 1)[0]
    down = positions_by_cell(torch.ones(1, 1, rows), 0, 1)[0]
    return down.T * across
