"""Iterative merging by magnitude, ranked over the whole model. OBIM, section 3.3, Table 3; docs/methods/obim.md."""

from __future__ import annotations

from merger.methods.im import im
from merger.ops.questions import Scope
from merger.pipeline.parameters import Number, Numbers, Order, SharesOrAuto
from merger.pipeline.registry import Stage, method


@method()
def ties_im(
    experts: tuple[str, ...],
    *,
    density: SharesOrAuto = 0.2,
    order: Order = "listed",
    scope: Scope = "global",
    count_base: bool = False,
    claim_zeros: bool = True,
    weight: Numbers = 1,
    lambda_: Number = 1,
) -> list[Stage]:
    """Each expert in turn claims its largest changes of the whole model among the positions that are still free."""
    return im(
        experts,
        density=density,
        order=order,
        scope=scope,
        score="magnitude",
        ratio_of="total",
        count_base=count_base,
        claim_zeros=claim_zeros,
        weight=weight,
        lambda_=lambda_,
    )
