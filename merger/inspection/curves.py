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
from merger.inspection.measures import Floats, Ints, Sums, Vectors
from merger.ops import Before, Flow, Sum, count

if TYPE_CHECKING:
    from torch import Tensor

DENSITIES = (Fraction(1, 20), *(Fraction(n, 10) for n in range(1, 11)))
"""The kept shares that a curve is drawn through."""


# --- where magnitude keeps a position -------------------------------------------------------------


def levels(deltas: Tensor, elements: int) -> Flow[Any]:
    """At how many of `DENSITIES` magnitude keeps each position of a slice [k r c]: numpy's uint8, 0 to d.

    They are the masks of the stage ``top`` with its defaults: a count of the whole tensor's ``elements``, equal
    ones to the lower flat index. Only what is not zero is kept.
    """
    import numpy

    shape = deltas.shape
    keys = deltas.abs().cpu().contiguous().view(torch.int32).numpy().reshape(len(deltas), -1)
    wanted = numpy.array([[count(share, elements) for share in DENSITIES]] * len(keys))
    high, left = yield Sum(partial(_high_tally, keys), then=partial(_descend, wanted))
    low, left = yield Sum(partial(_low_tally, keys, high), then=partial(_descend, left))
    last = high << 16 | low  # [k d]: the smallest that is kept, of which ``left`` are
    equal = _counts(keys, last)
    before = yield Before(torch.from_numpy(equal))
    room = left - before.numpy()
    kept = numpy.zeros(keys.shape, "uint8")
    for k, each in enumerate(keys):
        for at, there, budget in zip(last[k], equal[k], room[k], strict=True):
            kept[k] += each >= at if budget >= there else each > at
            if 0 < budget < there:  # the slice in which the equal ones run out
                kept[k][numpy.flatnonzero(each == at)[:budget]] += 1
    return (kept * (keys != 0)).reshape(shape)


def _high_tally(keys: Any) -> Tensor:
    """How often each high half occurs, [k 1 2^15]; a float without its sign sorts as its bits."""
    import numpy

    return torch.from_numpy(numpy.stack([numpy.bincount(each >> 16, minlength=1 << 15)[None] for each in keys]))


def _low_tally(keys: Any, high: Any) -> Tensor:
    """How often each low half occurs beside the high half of each density, [k d 2^16]."""
    import numpy

    tallies = numpy.zeros((*high.shape, 1 << 16), "int32")
    for each, wanted, tally in zip(keys, high, tallies, strict=True):
        halves, places = numpy.unique(wanted, return_inverse=True)
        slots = numpy.full(1 << 15, -1, "int32")
        slots[halves] = numpy.arange(len(halves))
        slot = slots[each >> 16]
        inside = numpy.flatnonzero(slot >= 0)
        found = numpy.bincount(slot[inside] << 16 | each[inside] & 0xFFFF, minlength=len(halves) << 16)
        tally[:] = found.reshape(len(halves), -1)[places]
    return torch.from_numpy(tallies)


def _descend(wanted: Any, tally: Tensor) -> tuple[Any, Any]:
    """Of each tally [k d n] or [k 1 n] the bin that holds the ``wanted``-th [k d] from the top, and how many of it.

    Where nothing is wanted: the last bin, none of it.
    """
    import numpy

    counts = numpy.broadcast_to(tally.numpy(), (*wanted.shape, tally.shape[-1]))
    bins, left = numpy.empty_like(wanted), numpy.empty_like(wanted)
    for place in numpy.ndindex(wanted.shape):
        above = counts[place][::-1].cumsum()
        step = numpy.searchsorted(above, wanted[place])
        bins[place] = tally.shape[-1] - 1 - step
        left[place] = wanted[place] - (above[step] - counts[place][bins[place]])
    return bins, left


def _counts(keys: Any, values: Any) -> Any:
    """How often each of ``values`` [k d] occurs among the keys of its expert."""
    import numpy

    return numpy.array(
        [[numpy.count_nonzero(each == value) for value in own] for each, own in zip(keys, values, strict=True)]
    )


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


def swept(kept: Any) -> tuple[Any, Any]:
    """Positions that both experts keep at each density, [k k d], and squares of what each row keeps, [k d]."""
    import numpy

    k, number = len(kept), len(DENSITIES)
    both = numpy.empty((k, k, number), "int64")
    for i in range(k):
        for j in range(i + 1):
            at = numpy.bincount(numpy.minimum(kept[i], kept[j]).ravel(), minlength=number + 1)
            both[i, j] = both[j, i] = at[:0:-1].cumsum()  # what is kept at a density is kept at all larger ones
    squares = [
        numpy.bitwise_count(numpy.packbits(kept >= number - d, axis=2)).sum(2, dtype="int64") ** 2
        for d in range(number)
    ]
    return both, numpy.stack([each.sum(1) for each in squares], 1)


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
