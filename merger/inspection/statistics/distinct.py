"""How many different values the task vectors of a tensor have: counted exactly, up to a bound that is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.kernels import counting

if TYPE_CHECKING:
    from torch import Tensor

MOST = 1 << 20
"""Different values that are told apart, of each expert in one tensor.

One more stands for all larger numbers. Fine-tunes in 16 bits have some thousand in a matrix; in float32 nearly
every element has a value of its own, and there is no more to know than that.
"""


class Values:
    """The different values of k task vectors of so many elements, collected slice by slice in any order."""

    def __init__(self, experts: int, elements: int) -> None:
        room = min(elements, 2 * (MOST + 1))  # for what was told apart, and for one slice more
        self._seen = torch.empty(experts, room, dtype=torch.int32)
        self._held = [0] * experts  # how many there are, some of them once for each slice that has them
        self._full = [False] * experts  # whether more than MOST were told apart

    def different(self, deltas: Tensor) -> Sequence[Tensor]:
        """Those of each task vector of a slice [k r c]; nothing once there is no more to know."""
        return () if all(self._full) else counting.of(deltas).different(deltas)

    def add(self, found: Sequence[Tensor]) -> None:
        """Joins what is `different` in a slice."""
        for i, own in enumerate(found):
            more = own[: MOST + 1]
            if self._held[i] + len(more) > self._seen.shape[1]:
                self._tell_apart(i)
            if not self._full[i]:
                self._seen[i, self._held[i] :][: len(more)] = more
                self._held[i] += len(more)

    def _tell_apart(self, i: int) -> None:
        seen = self._seen[i, : self._held[i]].view(torch.float32)
        (once,) = counting.of(seen).different(seen.unsqueeze(0))
        self._held[i] = min(len(once), MOST + 1)
        self._seen[i, : self._held[i]] = once[: MOST + 1]
        self._full[i] = len(once) > MOST

    def count(self) -> tuple[int, ...]:
        """How many each expert has, [k]; `MOST` + 1 where it has more than `MOST`."""
        for i in range(len(self._held)):
            self._tell_apart(i)
        return tuple(self._held)
