"""How many different values the task vectors of a tensor have: counted exactly, up to a bound that is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MOST = 1 << 20
"""Different values that are told apart, of each expert in one tensor: 4 MB of float32 patterns.

One more stands for all larger numbers. Fine-tunes in 16 bits have some thousand in a matrix; in float32 nearly
every element has a value of its own, and there is no more to know than that.
"""


class Values:
    """The different values of k task vectors, collected slice by slice in any order."""

    def __init__(self, experts: int) -> None:
        import numpy

        self._seen = [numpy.empty(0, "int32") for _ in range(experts)]

    def add(self, found: Sequence[Any]) -> None:
        """Joins what `different` found in a slice; an expert that has more than `MOST` already takes no more."""
        import numpy

        for i, (seen, more) in enumerate(zip(self._seen, found, strict=True)):
            if len(seen) <= MOST:
                self._seen[i] = numpy.union1d(seen, more)[: MOST + 1]

    def count(self) -> tuple[int, ...]:
        """How many each expert has, [k]; `MOST` + 1 where it has more than `MOST`."""
        return tuple(map(len, self._seen))


def different(deltas: Tensor) -> list[Any]:
    """The bit patterns of the different values of each task vector [k r c] other than zero, sorted."""
    import numpy

    flat = deltas.cpu().contiguous().numpy().reshape(len(deltas), -1)
    return [numpy.unique(each[each != 0].view("int32")) for each in flat]
