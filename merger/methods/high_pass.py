"""Leave out what changes slowly over a matrix: the filter of FR-Merging, https://arxiv.org/abs/2411.16815.

See docs/methods/weighting.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.methods._spectral import untouched, whole
from merger.pipeline.parameters import Shares
from merger.pipeline.registry import sparsifier

if TYPE_CHECKING:
    from torch import Tensor


@sparsifier(exact=False, takes=whole, elsewhere=untouched)
def high_pass(deltas: Tensor, *, radius: Shares = 0.01, head: bool = False) -> Tensor:
    """Takes the low frequencies out of each task vector's two-dimensional Fourier transform.

    Those nearer to frequency zero than `radius` times the shorter side of the matrix are left out, rounded up to whole
    steps: one step is the matrix's mean alone. At 0 nothing is left out. What is no matrix (and the head, tied or not,
    without `head`) stays as it is. At 0.01, [[4, 0], [0, 0]] becomes [[3, -1], [-1, -1]].
    """
    rows, columns = deltas.shape[1:]
    vertical, horizontal = (torch.fft.fftfreq(size, 1 / size, device=deltas.device) for size in (rows, columns))
    distances = (vertical[:, None].square() + horizontal.square()).sqrt()
    filtered = torch.empty_like(deltas)
    for k, (delta, share) in enumerate(zip(deltas, radius, strict=True)):
        passed = distances >= -(-share * min(rows, columns) // 1)
        filtered[k] = torch.fft.ifft2(torch.fft.fft2(delta.double()) * passed).real
    return filtered
