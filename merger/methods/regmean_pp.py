"""RegMean behind merged blocks. RegMean++, https://arxiv.org/abs/2508.03121; docs/methods/regression.md."""

from __future__ import annotations

from merger.methods.regmean import regmean
from merger.pipeline.parameters import Number, Numbers, Share
from merger.pipeline.registry import Stage, method, stage


@method()
def regmean_pp(*, alpha: Share = 0.9, weight: Numbers = 1, lambda_: Number = 1, head: bool = True) -> list[Stage]:
    """Is `regmean` with `inputs: merged`: an expert's text comes to its block through the merged blocks before it."""
    return [stage(regmean, inputs="merged", alpha=alpha, weight=weight, lambda_=lambda_, head=head)]
