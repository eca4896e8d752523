"""Bring a merge's features close to the experts'. FeatCal, https://arxiv.org/abs/2605.13030.

See docs/methods/regression.md.
"""

from __future__ import annotations

from merger.methods.regmean import regmean
from merger.pipeline.parameters import Number, Numbers, Share, Stretch
from merger.pipeline.registry import Anchor, Stage, method, stage


@method()
def featcal(
    *,
    target: Share = 0.25,
    ridge: Number = 0.05,
    anchor: Anchor = "wudi_svc",
    stretch: Stretch = 1,
    weight: Numbers = 1,
    lambda_: Number = 1,
    head: bool = True,
) -> list[Stage]:
    """Calibrates the anchor block by block, so that it answers on its own inputs as each expert does on its own."""
    return [
        stage(
            regmean,
            inputs="draft",
            target=target,
            alpha=1,
            normalize="frobenius",
            ridge=ridge,
            anchor=anchor,
            stretch=stretch,
            weight=weight,
            lambda_=lambda_,
            head=head,
        )
    ]
