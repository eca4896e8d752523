"""Low-rank task vectors: TSV-Compress, https://arxiv.org/abs/2412.00081, section 3.2; docs/methods/spectral.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.methods._spectral import untouched, whole
from merger.ops.arithmetic import count
from merger.ops.linalg import low_rank
from merger.pipeline.parameters import Shares
from merger.pipeline.registry import sparsifier

if TYPE_CHECKING:
    from torch import Tensor


@sparsifier(exact=False, takes=whole, elsewhere=untouched)
def truncate(deltas: Tensor, *, rank_share: Shares = 0.1, head: bool = False) -> Tensor:
    """Keeps the strongest singular directions of each task vector.

    It keeps the `rank_share` of min(rows, columns), at least one. At 0.5, diag(4, 3, 2, 1) becomes
    diag(4, 3, 0, 0). What is no matrix stays as it is.
    """
    full = min(deltas.shape[1:])
    ranks = [max(1, count(share, full)) for share in rank_share]
    return torch.stack([low_rank(delta, rank) for delta, rank in zip(deltas, ranks, strict=True)]).to(deltas)
