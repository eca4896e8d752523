"""Spectral truncation at equal nuclear norm. STAR, https://arxiv.org/abs/2502.10339, section 4.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.methods._spectral import untouched, whole
from merger.ops.linalg import svd
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import sparsifier

if TYPE_CHECKING:
    from torch import Tensor


def _percentages(eta: Sequence[Fraction], **_: object) -> None:
    for percentage in eta:
        if not 0 < percentage <= 100:
            raise ValueError(f"eta is {float(percentage):g}, but is a percentage above 0 and at most 100")


@sparsifier(exact=False, takes=whole, check=_percentages, elsewhere=untouched)
def nuclear(deltas: Tensor, *, eta: Numbers = 40, rescale: bool = True, head: bool = False) -> Tensor:
    """Keeps the strongest singular directions that hold `eta` percent of the sum of singular values.

    With `rescale` what is kept is multiplied so that this sum stays. At 40, diag(4, 3, 2, 1) becomes
    diag(10, 0, 0, 0). What is no matrix stays as it is.
    """
    return torch.stack([_nuclear(delta, share / 100, rescale) for delta, share in zip(deltas, eta, strict=True)])


def _nuclear(delta: Tensor, share: Fraction, rescale: bool) -> Tensor:
    factors = svd(delta)
    sums = factors.values.cumsum(0)
    rank = 1 + int((sums < float(share) * sums[-1:] * (1 - 1e-12)).sum())  # an exact hit counts
    if rank >= len(sums):
        return delta
    factor = sums[-1] / sums[rank - 1] if rescale else 1
    return (factors.first(rank).product() * factor).to(delta)
