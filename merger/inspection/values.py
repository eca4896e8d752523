"""How many different values the task vectors of a tensor have: counted exactly, up to a bound that is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.kernels import counting

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
        self._seen = [torch.empty(0, dtype=torch.int32) for _ in range(experts)]

    def different(self, deltas: Tensor) -> list[Tensor]:
        """Those of each task vector of a slice [k r c]; none of one that has more than `MOST` already."""
        loops = counting.of(deltas)
        return [
            loops.different(each) if len(seen) <= MOST else torch.empty(0, dtype=torch.int32)
            for seen, each in zip(self._seen, deltas, strict=True)
        ]

    def add(self, found: Sequence[Tensor]) -> None:
        """Joins what is `different` in a slice."""
        for i, (seen, more) in enumerate(zip(self._seen, found, strict=True)):
            if len(more):
                together = torch.cat([seen, more]).view(torch.float32)
                self._seen[i] = counting.of(together).different(together)[: MOST + 1]

    def count(self) -> tuple[int, ...]:
        """How many each expert has, [k]; `MOST` + 1 where it has more than `MOST`."""
        return tuple(map(len, self._seen))
