"""Overlap and balance against density, as in figure 2 of the CABS paper: magnitude pruning beside random masks.

One walk gives all densities: each position gets the number of densities at which magnitude keeps it. Random masks are
not drawn; their averages follow from the positions that the experts change.

Shapes: k experts, r rows, c columns, d densities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.inspection.counters import Floats, Ints, Sums, as_tuples
from merger.inspection.counters.balance import unevenness
from merger.inspection.counters.vectors import VectorSums
from merger.ops.arithmetic import count
from merger.ops.questions import Flow
from merger.ops.radix import nested_tops

if TYPE_CHECKING:
    from torch import Tensor

DENSITIES = (Fraction(1, 20), *(Fraction(n, 10) for n in range(1, 11)))
"""The densities that a curve is drawn through."""

LevelCounts = tuple[Any, Any]
"""Positions of both experts [k k d], and squared positions of each row, added up [k d]."""


def selection_levels(deltas: Tensor, elements: int) -> Flow[Tensor]:
    """At how many of `DENSITIES` magnitude keeps each position of a slice [k r c]: uint8, 0 to d.

    The masks are those of the stage ``top`` with its defaults: shares of the whole tensor's ``elements``, ties to the
    lower flat index. A position whose delta is zero is at level 0.
    """
    counts = [[count(density, elements)] * len(deltas) for density in DENSITIES]
    levels = yield from nested_tops(deltas, counts)
    return levels * (deltas != 0)


# --- sums -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CurveSums(Sums):
    """Task vectors pruned to each of `DENSITIES`, by magnitude and at random."""

    positions: tuple[Ints, ...]  # [k d] of either
    joint: tuple[tuple[Ints, ...], ...]  # [k k d] positions of both experts by magnitude
    joint_random: tuple[tuple[Floats, ...], ...]  # [k k d] the expectation of random masks
    unevenness: tuple[Floats, ...]  # [k d] over rows, times the elements of the matrix
    unevenness_random: tuple[Floats, ...]  # [k d]
    matrix_elements: int  # elements of the matrices that the unevenness is averaged over


def sum_curves(slices: Iterable[LevelCounts], vectors: VectorSums, rows: int, columns: int) -> CurveSums:
    """The sums of a whole part, from the `count_levels` of its slices and the sums of its task vectors."""
    import numpy

    joint, row_squares = (sum(counts) for counts in zip(*slices, strict=True))
    positions, changed = joint.diagonal().T, numpy.array(vectors.joint)
    sizes = changed.diagonal()[:, None]
    shares = positions / numpy.maximum(sizes, 1)
    matrix_elements = vectors.elements if min(rows, columns) > 1 else 0

    def over_rows(squares: Any) -> Any:
        spread = unevenness(torch.tensor(squares), rows, torch.tensor(positions))
        return as_tuples(spread.numpy() * matrix_elements)

    changed_squares = numpy.array(vectors.row_squares)[:, None]
    return CurveSums(
        positions=as_tuples(positions),
        joint=as_tuples(joint),
        joint_random=as_tuples(changed[:, :, None] * shares[:, None] * shares[None]),
        unevenness=over_rows(row_squares),
        unevenness_random=over_rows(_random_squares(sizes, positions, changed_squares)),
        matrix_elements=matrix_elements,
    )


def count_levels(levels: Tensor) -> LevelCounts:
    """Counts the `selection_levels` of a slice [k r c]."""
    import numpy

    values = levels.cpu().numpy()
    k, densities = len(values), len(DENSITIES)
    joint = numpy.empty((k, k, densities), "int64")
    for i in range(k):
        for j in range(i + 1):
            histogram = numpy.bincount(numpy.minimum(values[i], values[j]).ravel(), minlength=densities + 1)
            joint[i, j] = joint[j, i] = histogram[:0:-1].cumsum()  # a position of one density is one of all larger
    rows = (numpy.count_nonzero(values >= densities - d, axis=2) for d in range(densities))
    return joint, numpy.stack([(counts**2).sum(1) for counts in rows], 1)


def _random_squares(changed: Any, drawn: Any, squares: Any) -> Any:
    """The expected sum of squared counts of rows, where ``drawn`` of ``changed`` positions are drawn at random.

    A row with h changed positions has a hypergeometric count: mean h s with the share s = drawn / changed, and variance
    h s (1 - h / changed) (changed - drawn) / (changed - 1). ``squares`` are those of h, added over the rows.
    """
    import numpy

    total = numpy.maximum(changed, 1)
    rate = drawn / total
    variance = rate * (changed - squares / total) * (changed - drawn) / numpy.maximum(changed - 1, 1)
    return squares * rate**2 + variance
