"""Merge in the directions that the experts share. KnOTS, https://arxiv.org/abs/2410.19735; docs/methods/spectral.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.methods._spectral import has_matrix, whole
from merger.ops.linalg import svd
from merger.ops.questions import Flow
from merger.pipeline.registry import Inner, Stage, merger

if TYPE_CHECKING:
    from torch import Tensor

TIES = {"ties": {"density": 1}}


def _inner_alone(kind: str, *, head: bool, inner: Stage) -> list[Stage] | None:
    return None if has_matrix(kind, head=head) else [inner]


@merger(exact=False, takes=whole, elsewhere=_inner_alone)
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
    # an expert has nothing in another's directions, but rounding would give it a vote there
    negligible = turned.abs() <= 2.0**-24 * exact.norm(dim=1, keepdim=True)
    merged = yield from inside(turned.masked_fill_(negligible, 0).to(deltas))
    return (left_vectors @ merged.double()).to(deltas)
