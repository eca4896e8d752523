"""A shared model and what each expert has beside it. BYOM, https://arxiv.org/abs/2310.01886.

See docs/methods/packs.md, `fft`.

The survey ranks the residuals over the whole model; here each tensor keeps its share, so that the sizes of
all that is written are known from headers. Its low-rank form is `factors` with a `rank`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from merger.ops.arithmetic import count, summed
from merger.ops.questions import Flow
from merger.ops.selection import select
from merger.pipeline.parameters import Number, Share
from merger.pipeline.registry import Form, pack

if TYPE_CHECKING:
    from torch import Tensor


def _forms(*, rows: int, columns: int, density: Fraction, **_: object) -> dict[str, Form]:
    size = count(density, rows * columns)
    return {
        "merged": Form("weights", shared=True),
        "mask": Form("bits"),
        "own": Form("chosen", at="mask", count=size),
    }


def _rebuilt(merged: Tensor, mask: Tensor, own: Tensor) -> Tensor:
    return own.where(mask, merged)


@pack(forms=_forms, unpack=_rebuilt)
def byom(deltas: Tensor, *, density: Share = 0.1, lambda_: Number = 0.3) -> Flow[dict[str, Tensor]]:
    """Sums the task vectors times `lambda` for all experts, and keeps of each what the sum misses most.

    It is the expert's own change that is kept, at the `density` of each tensor's positions. (4, 0) and (0, 2) at
    lambda 0.5 share (2, 1); at density 0.5 the first keeps its 4, the second its 0: (4, 1) and (0, 1).
    """
    merged = summed(deltas) * float(lambda_)
    mask = yield from select((deltas - merged).abs(), [density] * len(deltas))
    return {"merged": merged, "mask": mask, "own": deltas}
