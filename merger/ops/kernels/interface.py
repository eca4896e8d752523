"""The interface of the loops over weights, which are implemented in torch and in compiled code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

A = TypeVar("A")
"""The arrays of an implementation: tensors, or expressions as well."""


class Loops(Protocol[A]):
    """The loops over the weights of a slice; `Reference` says what each of them computes."""

    def difference(self, stored: Tensor, refuse: Callable[[], None]) -> tuple[A, A]:
        """Returns base [r c] and deltas [k r c] of what is stored [1+k r c]."""

    def restored(self, stored: Tensor, base: A, deltas: A, delta: A) -> tuple[Tensor, bool]:
        """Returns base + delta [r c] in the dtype of ``stored``, and whether all of it is finite."""

    def keys_of(self, scores: A) -> A:
        """Returns keys [k n] that sort as the scores do by size."""

    def tally_high(self, keys: A, free: A | None, into: Tensor) -> None:
        """Counts the high halves of the free keys of each expert."""

    def tally_low(self, keys: A, free: A | None, buckets: list[int], into: Tensor) -> None:
        """Counts the low halves of the free keys of each expert that have its high half."""

    def tally_near(self, keys: A, free: A | None, first: list[int], into: Tensor) -> None:
        """Counts the free keys of each expert from its ``first`` on."""

    def count_equal(self, keys: A, free: A | None, last: list[int]) -> Tensor:
        """Returns how many free keys of each expert are exactly its ``last``."""

    def mark_top(self, keys: A, free: A | None, last: list[int], room: list[int]) -> A:
        """Returns a mask of the free keys above ``last``, and of the first ``room`` that equal it."""

    def top_of_rows(self, scores: A, counts: Tensor, free: A) -> Tensor:
        """Returns a mask of the ``counts`` highest free scores of each row."""

    def top_of_blocks(self, scores: A, n: int, m: int, free: A | None, tail: int) -> A:
        """Returns a mask of the ``n`` highest free scores of every ``m`` elements."""

    def ranks_of_rows(self, scores: A) -> A:
        """Returns each element's place in its row."""

    def at_least(self, values: A, limits: A) -> A:
        """Returns a mask of the values that are at least their limit."""

    def keep(self, deltas: A, mask: A) -> A:
        """Returns the deltas where the mask is true, and 0 elsewhere."""

    def weighted_sum(self, deltas: A, weights: Tensor) -> A:
        """Returns the sum of the deltas times their weights."""

    def anchored_sum(self, deltas: A, weights: Tensor) -> A:
        """Returns the first delta, and what the others add to it times their weights."""

    def mean_of_agreeing(self, deltas: A, elected: A, weights: Tensor) -> A:
        """Returns the weighted mean of the deltas that have the elected sign."""

    def uniforms(self, key: bytes, start: int, shape: Sequence[int], *, double: bool) -> A:
        """Returns uniforms in [0, 1) of a Philox stream."""
