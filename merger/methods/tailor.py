"""The patch of Model Tailor, https://arxiv.org/abs/2402.12048, section 3; docs/methods/weighting.md."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from merger.methods._spectral import whole
from merger.methods._thinning import by_magnitude, check_damping, thinned
from merger.ops.questions import Flow
from merger.pipeline.parameters import Share, Shares
from merger.pipeline.registry import sparsifier

if TYPE_CHECKING:
    from torch import Tensor


@sparsifier(takes=whole, exact=False, check=check_damping, elsewhere=by_magnitude)
def tailor(
    deltas: Tensor, base: Tensor, gram: Tensor | None, *, density: Shares = 0.1, damping: Share = 0.01
) -> Flow[Tensor]:
    """Keeps the `density` of each task vector that changed much where the weights matter, made up for what goes.

    It is `sparsegpt` by another score: among 128 columns each row's |delta| and its w^2 / (H^-1)_jj, w of the expert's
    weights, are brought to mean 0 and deviation 1 and averaged. Needs calibration text, as `sparsegpt` does; a tensor
    without inputs of its own is thinned by magnitude.
    """
    return thinned(deltas, gram, partial(_fusion_score, base.double()), density, damping, None)


def _fusion_score(base: Tensor, delta: Tensor, columns: slice, inverse: Tensor) -> Tensor:
    """The mean of the two standardised scores [r b], from the least of them on: a selection takes sizes."""
    weights = base[:, columns] + delta
    scores = (_standardised(delta.abs()) + _standardised(weights.square() / inverse)) / 2
    return scores - scores.min()


def _standardised(values: Tensor) -> Tensor:
    """Each row [r b] at mean 0 and deviation 1; 0 where all of a row is equal."""
    deviation, mean = values.std(1, correction=0, keepdim=True), values.mean(1, keepdim=True)
    return (values - mean) / deviation.where(deviation > 0, 1)
