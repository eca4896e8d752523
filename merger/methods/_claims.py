"""Claims of experts that choose positions in turn: a position that an expert claims is closed to the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def claims(
    shares: Sequence[Fraction], order: Sequence[int] | None, claim_zeros: bool, ratio_of: str = "total"
) -> Sequence[Fraction]:
    """The share of a tensor that each expert closes to those after it, whether or not it changed it; or nothing."""
    if order is None or not claim_zeros:
        return ()
    free, claimed = Fraction(1), [Fraction(0)] * len(shares)
    for k in order[:-1]:  # nobody chooses after the last one
        claimed[k] = shares[k] if ratio_of == "total" else shares[k] * free
        free -= claimed[k]
    return claimed


def remark_on_zeros(claimed: Sequence[Fraction]) -> str:
    """A plan's note on claims of positions that an expert did not change; empty where there are none."""
    if not any(claimed):
        return ""
    return (
        "claim_zeros is true, so an expert claims its share even of positions that it did not change: these stay at "
        "the base, though later experts changed them; claim_zeros: false leaves them to the next expert"
    )
