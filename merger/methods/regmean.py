"""RegMean: regression for matrices, the mean elsewhere. RegMean, https://arxiv.org/abs/2212.09849; methods.md 6.4."""

from __future__ import annotations

from merger.methods._parameters import Number, Numbers, Share
from merger.methods._registry import Stage, method, stage
from merger.methods.mean import mean
from merger.methods.regression import regression
from merger.methods.scale import scale


@method()
def regmean(kind: str, *, alpha: Share = 0.9, weight: Numbers = 1, lambda_: Number = 1) -> list[Stage]:
    """Every matrix comes as close as it can to what each expert's makes of that expert's own inputs.

    Embeddings, norms and biases are averaged. Needs calibration text; the Gram matrices of a block are
    made and used before those of the next, so none are kept.
    """
    merged = (
        stage(regression, alpha=alpha, weight=weight)
        if kind in ("linear", "conv1d", "head", "expert3d")
        else stage(mean, weight=weight)
    )
    return [merged, stage(scale, lambda_=lambda_)]
