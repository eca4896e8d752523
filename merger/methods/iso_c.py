"""One singular value for all directions. Iso-C, https://arxiv.org/abs/2502.04959, section 4.1.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods._spectral import averaged, weighted, whole
from merger.ops.arithmetic import summed
from merger.ops.linalg import isotropic
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


@merger(exact=False, takes=whole, elsewhere=averaged)
def iso_c(deltas: Tensor, *, weight: Numbers = 1, lambda_: Number = 1, head: bool = False) -> Tensor:
    """Gives every singular direction of the summed task vectors the mean of their singular values.

    The nuclear norm stays, and directions that the sum does not have stay empty. `lambda` is the paper's
    alpha. What is no matrix (and the head, unless `head`) gets the mean.
    diag(3, 1, 0) and diag(1, 1, 0) make diag(3, 3, 0).
    """
    return (isotropic(summed(weighted(deltas, weight))) * float(lambda_)).to(deltas)
