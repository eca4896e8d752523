"""Regression on Gram matrices of the task vectors. ACTMat, https://arxiv.org/abs/2604.01329; docs/methods/wudi.md.

Of a 135M model's three fine-tunes in bfloat16 it kept 0.805, 0.869, 0.891, 0.891 and 0.873 of the gain with `omega` at
0.01, 0.03, 0.1, 0.3 and 1 (six held-out texts a domain); with the paper's pseudo-inverse it was worse than the base.
"""

from __future__ import annotations

from merger.methods.wudi import wudi
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import Stage, method, stage


@method()
def actmat(*, omega: Number = 0.1, weight: Numbers = 1, lambda_: Number = 1, head: bool = False) -> list[Stage]:
    """The regression of `regmean` with delta_k^T delta_k in place of the Gram matrix of the inputs; needs no text.

    That is `wudi` without dividing by ||delta_k||^2. `omega` 0 is the paper's pseudo-inverse.
    """
    return [stage(wudi, omega=omega, normalize="none", weight=weight, lambda_=lambda_, head=head)]
