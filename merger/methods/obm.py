"""Optimal Brain Merging saliency. OBIM, section 3.1, equations 3 to 6; docs/methods/obim.md.

The layer's error is quadratic in the change of its weights, so s_ij = 1/2 * (2 h_j) * delta_ij^2 is
exactly the mean squared change of its output when delta_ij alone is set to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from merger.pipeline.registry import score

if TYPE_CHECKING:
    from torch import Tensor

    from merger.pipeline.registry import Draw


def _inputs(hessian: str, **_: object) -> Mapping[str, str]:
    return {} if hessian == "none" else {name: name for name in ("second_moment", "mean_input", "token_share")}


@score(inputs=_inputs)
def obm(
    deltas: Tensor,
    second_moment: Tensor | None,
    mean_input: Tensor | None,
    token_share: Tensor | None,
    uniform: Draw,
    kind: str,
    *,
    hessian: Literal["second_moment", "mean_square", "none"] = "second_moment",
    nonlinear: Literal["random", "magnitude"] = "random",
    embedding: Literal["magnitude", "random", "token_freq"] = "magnitude",
) -> Tensor:
    """h_j * delta_ij^2, where h_j = E[x_j^2] is the second moment of the expert's own input to the matrix.

    `hessian: mean_square` takes (E[x_j])^2 instead, `none` takes 1 (the masks of magnitude). Tensors
    without inputs of their own follow `nonlinear` and `embedding`; `token_freq` is E[x_j^2] of the
    one-hot token. For h = (1, 4, 0, 5) the row (4, -3, 1, 0) scores (16, 36, 0, 0).
    """
    if hessian == "none":
        return deltas.square()
    if second_moment is not None and mean_input is not None:
        h = second_moment if hessian == "second_moment" else mean_input.square()
        return deltas.square() * h
    rule = embedding if kind == "embedding" else nonlinear
    if rule == "token_freq" and token_share is not None:
        return token_share * deltas.square()
    return uniform("im-random", double=True) if rule == "random" else deltas.abs()
