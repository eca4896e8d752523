"""Merge in the joint directions of all adapters. Core Space, https://arxiv.org/abs/2509.17786.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.methods._spectral import TIES, inner_alone, negligible_as_zero, whole
from merger.ops.linalg import side_by_side, svd
from merger.ops.questions import Flow
from merger.pipeline.registry import CoreInner, merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False, takes=whole, elsewhere=inner_alone)
def core_space(
    deltas: Tensor,
    inside: Callable[[Tensor], Flow[Tensor]],
    *,
    inner: CoreInner = TIES,
    head: bool = False,
) -> Flow[Tensor]:
    """Turns all task vectors to the joint directions of their outputs and of their inputs, and merges them there.

    Each task vector is B_k A_k, its singular vectors times the roots of its singular values, as an adapter's factors
    are. With U the left singular vectors of [B_1 ... B_K] and V the right ones of the A_k below each other, `inner`
    merges the core matrices U^T B_k A_k V, which for adapters are as small as the sum of their ranks, and the result M
    makes U M V^T. Nothing is lost: a method that only adds gives what it gives without this. `inner` looks at task
    vectors alone; a share in it is one of a core matrix. What is no matrix (and the head, unless `head`) gets `inner`
    as it stands.
    """
    ups, downs, ranks = _stacked_factors(deltas)
    left, right = svd(ups).left, svd(downs).left
    if not left.shape[1]:
        return torch.zeros_like(deltas[0])
    factors = zip(torch.split(ups, ranks, 1), torch.split(downs, ranks, 1), strict=True)
    cores = torch.stack([(left.T @ up) @ (down.T @ right) for up, down in factors])
    sizes = cores.norm(dim=(1, 2), keepdim=True)
    merged = yield from inside(negligible_as_zero(cores, sizes).to(deltas))
    return (left @ merged.double() @ right.T).to(deltas)


def _stacked_factors(deltas: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """[B_1 ... B_K] and [A_1^T ... A_K^T] side by side in float64, and the rank of each task vector."""
    by_expert = [svd(delta) for delta in deltas]
    ranks = [len(factors.values) for factors in by_expert]
    stacked = side_by_side(by_expert)
    del by_expert  # as large as the stacks, where experts are no adapters
    root = stacked.values.sqrt()
    return stacked.left.mul_(root), stacked.right.mul_(root), ranks
