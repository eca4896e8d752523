"""Overlap and balance against density, as in figure 2 of the CABS paper: magnitude pruning beside random masks.

One walk gives all densities: every position learns at how many of them magnitude keeps it. The random masks are
not drawn; what they do on average follows from what the experts change at all.

Shapes: k experts, r rows, c columns, d densities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.inspection.balance import unevenness
from merger.inspection.sums import Floats, Ints, Sums, Vectors
from merger.ops import kernels
from merger.ops.arithmetic import count
from merger.ops.questions import Flow, PrefixSum
from merger.ops.radix import Tally

if TYPE_CHECKING:
    from torch import Tensor

DENSITIES = (Fraction(1, 20), *(Fraction(n, 10) for n in range(1, 11)))
"""The kept shares that a curve is drawn through."""


# --- where magnitude keeps a position -------------------------------------------------------------


def levels(deltas: Tensor, elements: int) -> Flow[Tensor]:
    """At how many of `DENSITIES` magnitude keeps each position of a slice [k r c]: uint8, 0 to d.

    They are the masks of the stage ``top`` with its defaults: a count of the whole tensor's ``elements``, equal
    ones to the lower flat index, found as `ops.select` does but for all densities at once. Only what is not zero
    is kept.
    """
    loops = kernels.of(deltas)
    keys = loops.keys_of(deltas.abs())
    d, k = len(DENSITIES), len(deltas)
    wanted = torch.tensor([[count(share, elements)] * k for share in DENSITIES])

    def low_halves(into: Tensor) -> None:
        for buckets, tally in zip(high.tolist(), into, strict=True):
            loops.tally_low(keys, None, buckets, tally)

    high_halves = partial(loops.tally_high, keys, None)
    high, left = yield Tally(high_halves, (k, kernels.HIGH), "tensor", partial(_descend, wanted))
    low, left = yield Tally(low_halves, (d, k, kernels.LOW), "tensor", partial(_descend, left))
    last = (high << 16 | low).tolist()  # [d k]: the smallest that are kept, ``left`` of each
    before = yield PrefixSum(lambda: torch.stack([loops.count_equal(keys, None, own) for own in last]))
    kept = torch.zeros(deltas.shape, dtype=torch.uint8, device=deltas.device)
    for own, room in zip(last, (left - before).tolist(), strict=True):
        kept += loops.mark_top(keys, None, own, room)
    return kept * (deltas != 0)


def _descend(wanted: Tensor, tally: Tensor) -> tuple[Tensor, Tensor]:
    """Of each tally [d k n], or [k n], the bin that holds the ``wanted``-th [d k] from the top, and how many of it.

    Where nothing is wanted: the last bin, none of it.
    """
    tally = tally.cpu().expand(*wanted.shape, -1)
    above = tally.flip(-1).cumsum(-1)
    steps = torch.searchsorted(above, wanted.unsqueeze(-1))
    bins = tally.shape[-1] - 1 - steps
    left = wanted.unsqueeze(-1) - (above.gather(-1, steps) - tally.gather(-1, bins))
    return bins.squeeze(-1), left.squeeze(-1)


# --- sums -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves(Sums):
    """Task vectors pruned to each of `DENSITIES`, by magnitude and at random."""

    kept: tuple[Ints, ...]  # [k d] positions, of either
    both: tuple[tuple[Ints, ...], ...]  # [k k d] positions that magnitude keeps of both
    both_random: tuple[tuple[Floats, ...], ...]  # [k k d] the expectation of random masks
    uneven: tuple[Floats, ...]  # [k d] over rows, times the elements of the matrix
    uneven_random: tuple[Floats, ...]  # [k d]
    in_matrices: int  # elements of matrices, over which unevenness is averaged


def curves(slices: Iterable[tuple[Any, Any]], total: Vectors, held_squares: Tensor, rows: int, columns: int) -> Curves:
    """The sums of a whole part, from what `swept` counted in its slices, beside the sums of its task vectors.

    ``held_squares`` [k] are the squared counts of what each row of those holds, added up.
    """
    import numpy

    both, row_squares = (sum(each) for each in zip(*slices, strict=True))
    kept, everything = both.diagonal().T, numpy.array(total.both)
    held = everything.diagonal()[:, None]
    shares = kept / numpy.maximum(held, 1)
    matrix = rows > 1 and columns > 1

    def uneven(squares: Any) -> Any:
        spread = unevenness(torch.tensor(squares), rows, torch.tensor(kept))
        return _nested(spread.numpy() * (total.elements if matrix else 0))

    return Curves(
        elements=total.elements,
        kept=_nested(kept),
        both=_nested(both),
        both_random=_nested(everything[:, :, None] * shares[:, None] * shares[None]),
        uneven=uneven(row_squares),
        uneven_random=uneven(_random_squares(held, kept, held_squares.numpy()[:, None])),
        in_matrices=total.elements if matrix else 0,
    )


def swept(kept: Tensor) -> tuple[Any, Any]:
    """Given `levels`: positions that both experts keep at each density, [k k d]; squares of what rows keep, [k d]."""
    import numpy

    values = kept.cpu().numpy()
    k, number = len(values), len(DENSITIES)
    both = numpy.empty((k, k, number), "int64")
    for i in range(k):
        for j in range(i + 1):
            at = numpy.bincount(numpy.minimum(values[i], values[j]).ravel(), minlength=number + 1)
            both[i, j] = both[j, i] = at[:0:-1].cumsum()  # what is kept at a density is kept at all larger ones
    rows = (numpy.count_nonzero(values >= number - d, axis=2) for d in range(number))
    return both, numpy.stack([(each**2).sum(1) for each in rows], 1)


def _random_squares(held: Any, kept: Any, squares: Any) -> Any:
    """What the squared counts of rows add up to on average, where ``kept`` of ``held`` positions are drawn.

    A row with h of them has a hypergeometric count: mean h s with the share s = kept / held, and variance
    h s (1 - h / held) (held - kept) / (held - 1). ``squares`` are those of h, added over the rows.
    """
    import numpy

    whole = numpy.maximum(held, 1)
    share = kept / whole
    return squares * share**2 + share * (held - squares / whole) * (held - kept) / numpy.maximum(held - 1, 1)


def _nested(values: Any) -> Any:
    """An array as tuples of tuples."""
    return tuple(map(_nested, values)) if values.ndim > 1 else tuple(values.tolist())
