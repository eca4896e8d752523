"""Merge in the directions that the experts share. KnOTS, https://arxiv.org/abs/2410.19735; docs/methods/spectral.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.methods._spectral import TIES, inner_alone, negligible_as_zero, whole
from merger.ops.linalg import svd
from merger.ops.questions import Flow
from merger.pipeline.registry import Inner, merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False, takes=whole, elsewhere=inner_alone)
def knots(
    deltas: Tensor,
    inside: Callable[[Tensor], Flow[Tensor]],
    *,
    inner: Inner = TIES,
    head: bool = False,
) -> Flow[Tensor]:
    """Turns all task vectors to the singular directions of their outputs together, and merges them there.

    `inner` is any method that looks at task vectors alone; one that only adds them gives what it gives
    without this. A share in it is one of as many rows as there are directions. What is no matrix (and
    the head, unless `head`) gets `inner` as it stands.
    """
    exact = deltas.double()
    left_vectors = svd(torch.cat(list(exact), 1)).left
    if not left_vectors.shape[1]:
        return torch.zeros_like(deltas[0])
    turned = left_vectors.T @ exact
    merged = yield from inside(negligible_as_zero(turned, exact.norm(dim=1, keepdim=True)).to(deltas))
    return (left_vectors @ merged.double()).to(deltas)
