"""Iterative merging with mutually exclusive masks. OBIM, section 3.2, equations 7 and 8, Algorithm 1."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.methods.top import top
from merger.ops.arithmetic import RatioOf
from merger.ops.questions import Scope
from merger.pipeline.parameters import Number, Numbers, Order, Shares, SharesOrAuto, at_depth
from merger.pipeline.registry import Score, Stage, method, stage


def at_most_whole(density: Any, experts: tuple[str, ...], ratio_of: str) -> None:
    """Shares of the whole that add up to more than the whole cannot be disjoint (docs/methods/obim.md)."""
    if ratio_of != "total":
        return
    by_name = density if isinstance(density, dict) else dict.fromkeys(experts, density)
    shares = [by_name.get(name, 0) for name in experts]
    lists = [d for d in shares if isinstance(d, list)]
    bends = {Fraction(0), *(Fraction(i, len(d) - 1) for d in lists for i in range(len(d)))}
    total = max(sum(at_depth(d, bend) for d in shares) for bend in bends)
    if total > 1:
        raise ValueError(
            f"the densities add up to {float(total):g}, but disjoint masks cannot hold more than 1: "
            "lower them, write 'auto', or set ratio_of: remaining"
        )


def even_shares(density: Any, experts: tuple[str, ...], count_base: bool) -> Shares:
    """The densities themselves, or 1/K each for `auto`: 1/(K + 1) where the base keeps a share."""
    return Fraction(1, len(experts) + count_base) if density == "auto" else density


@method()
def im(
    experts: tuple[str, ...],
    *,
    density: SharesOrAuto = "auto",
    order: Order = "rotation",
    score: Score = "magnitude",
    scope: Scope = "tensor",
    ratio_of: RatioOf = "total",
    count_base: bool = False,
    claim_zeros: bool = True,
    weight: Numbers = 1,
    lambda_: Number = 1,
) -> list[Stage]:
    """Each expert in turn claims its `density` of the positions that earlier ones left; the rest stays at the base."""
    shares = even_shares(density, experts, count_base)
    at_most_whole(shares, experts, ratio_of)
    return [
        stage(
            top,
            density=shares,
            score=score,
            scope=scope,
            exclusive=order,
            ratio_of=ratio_of,
            claim_zeros=claim_zeros,
        ),
        stage(sum_, weight=weight),
        stage(scale, lambda_=lambda_),
    ]
