"""Spectral truncation and rescale, then the average. STAR, https://arxiv.org/abs/2502.10339.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from merger.methods.mean import mean
from merger.methods.nuclear import nuclear
from merger.methods.scale import scale
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import Stage, method, stage


@method()
def star(*, eta: Numbers = 40, weight: Numbers = 1, lambda_: Number = 1, head: bool = False) -> list[Stage]:
    """Averages what `eta` percent of each task vector's nuclear norm leaves of it, scaled up to that norm."""
    return [stage(nuclear, eta=eta, head=head), stage(mean, weight=weight), stage(scale, lambda_=lambda_)]
