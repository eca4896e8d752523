"""Regression of the experts' outputs. RegMean, https://arxiv.org/abs/2212.09849, section 4; docs/methods/regression.md.

With `inputs: merged` it is RegMean++, https://arxiv.org/abs/2508.03121; `featcal` is a setting of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from merger._lazy import torch
from merger.methods._regression import Evidence
from merger.methods._spectral import averaged, runs
from merger.methods.regmean_diag import a_share_each
from merger.ops.questions import Flow
from merger.pipeline.parameters import Number, Numbers, Share, Stretch
from merger.pipeline.registry import Anchor, merger

if TYPE_CHECKING:
    from torch import Tensor


def _inputs(*, inputs: str, **_: object) -> Mapping[str, str]:
    if inputs == "draft":
        return {"gram": "draft_gram", "cross_moment": "cross_moment"}
    return {"gram": "merged_gram" if inputs == "merged" else "gram"}


def _check(*, ridge: Fraction, target: Fraction, inputs: str, weight: Any, **_: object) -> None:
    a_share_each(weight)
    if ridge < 0:
        raise ValueError(f"ridge is {float(ridge):g}, but a ridge cannot be negative")
    if target and inputs != "draft":
        raise ValueError("target: needs the inputs of the merge and of the expert side by side; write inputs: draft")


@merger(exact=False, takes=runs, inputs=_inputs, check=_check, elsewhere=averaged)
def regmean(
    deltas: Tensor,
    base: Tensor,
    inside: Callable[[Tensor], Flow[Tensor]],
    gram: Tensor | None,
    cross_moment: Tensor | None,
    *,
    alpha: Share = 0.9,
    inputs: Literal["own", "merged", "draft"] = "own",
    target: Share = 0,
    normalize: Literal["none", "frobenius", "trace"] = "none",
    ridge: Number = 0,
    anchor: Anchor = "mean",
    stretch: Stretch = 1,
    weight: Numbers = 1,
    lambda_: Number = 1,
    head: bool = True,
) -> Flow[Tensor]:
    """The weights whose outputs come closest, in the least squares, to each expert's on its own inputs.

    With G_k = E[x x^T] [c c] of expert k, of which `alpha` keeps that share of what is off the diagonal and
    `normalize` divides by its norm or trace: (sum of delta_k G_k + ridge stretch anchor) (sum of G_k + ridge I)^-1, in
    float64. What the inputs say nothing about goes to the anchor, the result of any other method, times `stretch` or,
    with `fit`, times the factor that errs least. At `alpha` 0 it is the mean of every column weighted by E[x_j^2]. An
    expert that no input reached has no say; where none was reached it is the anchor times `stretch`. Embeddings, norms
    and biases (and the head, tied or not, without `head`) get the plain mean. Needs calibration text; the Gram matrices
    of a block are made and used before those of the next, so none are kept. With `inputs: merged` an expert's text
    comes to its block through the merged blocks before it, and not through its own; with `draft` also the block is not
    the expert's, but the anchor, and the outputs to come close to are those on the share `target` of the expert's own
    inputs and the rest of the draft's.
    """
    anchored = (yield from inside(deltas)).double()
    if gram is None or not gram.any():
        factor = 1.0 if stretch == "fit" else float(stretch)
        return (anchored * factor * float(lambda_)).to(deltas)
    evidence = Evidence(deltas[0].double())
    for number, (delta, expert_gram, share) in enumerate(zip(deltas, gram, weight, strict=True)):
        scale = float(share) / _size(expert_gram, normalize)
        exact = delta.double() if number else evidence.first
        drift = None
        if cross_moment is not None and target:
            change = _shrunk(cross_moment[number] - expert_gram, float(alpha)).mul_(float(target) * scale)
            drift = (base + exact) @ change
        evidence.add(exact, _shrunk(expert_gram, float(alpha)).mul_(scale), drift)
    factor = (yield from evidence.fit(anchored)) if stretch == "fit" else float(stretch)
    return (evidence.solve(anchored * factor, float(ridge)) * float(lambda_)).to(deltas)


def _shrunk(moments: Tensor, alpha: float) -> Tensor:
    """A copy of a moment matrix [c c] in float64, with the share ``alpha`` of what is off its diagonal."""
    shrunk = moments.to(torch.float64, copy=True).mul_(alpha)
    shrunk.diagonal().copy_(moments.diagonal())
    return shrunk


def _size(gram: Tensor, normalize: str) -> float:
    """What a Gram matrix is divided by; 1 for one of zeros."""
    if normalize == "frobenius":
        return float(gram.double().norm()) or 1.0
    return float(gram.trace()) or 1.0 if normalize == "trace" else 1.0
