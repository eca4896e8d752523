"""Tensor arithmetic that methods share: questions about a whole tensor, sums over experts, draws.

A method sees one slice of one tensor at a time. What it must know of the whole it asks with a
``yield``: the flow stops there, the runner puts the question to every slice, and the flow goes on
with the answer; a tensor among the answers is on the CPU, where the parts of all slices meet, and `.to(deltas)`
takes it to where the slice is.

Shapes: k experts, r rows, c columns; a vector is one row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from merger._lazy import torch
from merger.ops import kernels

if TYPE_CHECKING:
    from torch import Tensor

RatioOf = Literal["total", "remaining"]


def count(share: Fraction, of: int) -> int:
    """How many of ``of`` elements a ratio selects: floor(share * of), exact (docs/methods/README.md)."""
    return math.floor(share * of)


def column(values: Sequence[Fraction], template: Tensor) -> Tensor:
    """One number per expert as a [k 1 1] tensor of ``template``'s dtype and device."""
    return torch.tensor([float(v) for v in values], dtype=template.dtype, device=template.device).view(-1, 1, 1)


def summed(terms: Tensor) -> Tensor:
    """The sum over the experts [k r c] -> [r c], always in their order.

    torch's own sum over five or more associates by the slice's shape, so its last bit would depend
    on how a tensor was cut.
    """
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def weighted_sum(deltas: Tensor, weights: Sequence[Fraction]) -> Tensor:
    """The sum over the experts of delta [k r c] times weight, in their order: [r c]."""
    return kernels.of(deltas).weighted_sum(deltas, column(weights, deltas).flatten())


def anchored_mean(deltas: Tensor, weights: Sequence[Fraction]) -> Tensor:
    """The weighted mean of the deltas [k r c], from the first on, so that equal ones come back bit for bit: [r c]."""
    total = sum(weights)
    return kernels.of(deltas).anchored_sum(deltas, column([w / total for w in weights], deltas).flatten())


def mean_of_agreeing(deltas: Tensor, elected: Tensor, weights: Tensor) -> Tensor:
    """The mean, by ``weights`` [k 1 1], of the deltas [k r c] that have the sign of ``elected`` [r c], or 0: [r c]."""
    return kernels.of(deltas).mean_of_agreeing(deltas, elected, weights.flatten())


def combined(vectors: Tensor, coefficients: Tensor) -> Tensor:
    """The sum of ``vectors`` [k r c] times ``coefficients`` [k] or [k . .], float64. [r c]

    It starts from the first, so that equal vectors come back bit for bit where the coefficients add up to 1.
    """
    factors = coefficients if coefficients.dim() == 3 else coefficients.view(-1, 1, 1)
    merged = vectors[0] * summed(factors).to(vectors)
    for vector, coefficient in zip(vectors[1:], factors[1:].to(vectors), strict=True):
        merged += (vector - vectors[0]) * coefficient
    return merged


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean over the experts at each position by ``weights`` [k r c]; 0 where these add up to 0. [r c]"""
    total = summed(weights)
    return summed(values * (weights / total.masked_fill(total == 0, 1)))  # one alone has a share of exactly 1


def at_least(values: Tensor, limits: Tensor) -> Tensor:
    """Where a value is as large as its limit or larger: bool."""
    return kernels.of(values).at_least(values, limits)


def keep(deltas: Tensor, mask: Tensor) -> Tensor:
    """The deltas where ``mask`` is true, zero elsewhere."""
    return kernels.of(deltas).keep(deltas, mask)


# --- draws: counter-based, so that no mask depends on what was visited before ---------------------


def uniforms(
    key: tuple[object, ...], start: int, *shape: int, double: bool = False, slice_values: Tensor | None = None
) -> Tensor:
    """Uniforms in [0, 1) of this form from position ``start`` of the stream named by ``key``, on the CPU.

    Where the slice that they go ``slice_values`` is not computed before someone looks, neither are they.

    Philox4x64-10, keyed by the first 16 bytes of the SHA-256 of the names joined by 0x1f
    (docs/methods/README.md): float32 takes 24 bits of each 32-bit half, low half first, float64 takes 53.
    """
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return kernels.for_draws(slice_values).uniforms(digest[:16], start, shape, double=double)
