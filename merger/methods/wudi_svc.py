"""WUDI with calibrated singular values. https://arxiv.org/abs/2503.08099 and https://arxiv.org/abs/2602.05536.

See docs/methods/wudi.md.
"""

from __future__ import annotations

from merger.methods.scale import scale
from merger.methods.svc import svc
from merger.methods.wudi import wudi
from merger.pipeline.parameters import Number, Numbers, ShareOrAuto
from merger.pipeline.registry import Stage, method, stage


@method()
def wudi_svc(
    *,
    omega: Number = 0.3,
    alpha: ShareOrAuto = "auto",
    weight: Numbers = 1,
    lambda_: Number = 1,
    head: bool = True,
) -> list[Stage]:
    """Interferes least with what each expert changed, then counts each output direction as often as the experts do."""
    return [
        stage(wudi, omega=omega, weight=weight, head=head),
        stage(svc, alpha=alpha, weight=weight, head=head),
        stage(scale, lambda_=lambda_),
    ]
