"""Unevenness: whether a matrix holds its positions in few rows, columns or blocks (CABS, section 3).

Random masks of density p have sqrt((1 - p) / (p c)) over rows of c elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.statistic import BY_EXPERT, floats, share, statistic

if TYPE_CHECKING:
    from torch import Tensor


@statistic(
    form=BY_EXPERT, unit="ratio", formula="std / mean over rows", counters=[VectorCounter], order=60, in_layers=True
)
def uneven_rows(vectors: VectorSums) -> Tensor:
    """Standard deviation over mean of the positions in each row of a matrix; mean over matrices by their size."""
    return _mean_over_matrices(vectors, 0)


@statistic(form=BY_EXPERT, unit="ratio", formula="std / mean over columns", counters=[VectorCounter], order=62)
def uneven_columns(vectors: VectorSums) -> Tensor:
    """Standard deviation over mean of the positions in each column of a matrix; mean over matrices by their size."""
    return _mean_over_matrices(vectors, 1)


@statistic(form=BY_EXPERT, unit="ratio", formula="std / mean over blocks", counters=[VectorCounter], order=64)
def uneven_blocks(vectors: VectorSums) -> Tensor:
    """Standard deviation over mean of the positions in every 256 consecutive elements of a matrix; mean over matrices
    by their size.
    """
    return _mean_over_matrices(vectors, 2)


def _mean_over_matrices(vectors: VectorSums, lines: int) -> Tensor:
    return share(floats(vectors.unevenness[lines]), vectors.matrix_elements[lines])
