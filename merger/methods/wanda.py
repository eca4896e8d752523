"""Wanda on task vectors: the size of a change times the norm of its input. https://arxiv.org/abs/2306.11695."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.pipeline.registry import score

if TYPE_CHECKING:
    from torch import Tensor


@score(scope="row")
def wanda(deltas: Tensor, second_moment: Tensor | None) -> Tensor:
    """|delta_ij| * sqrt(E[x_j^2]), ranked within each row; tensors without inputs of their own by |delta|.

    It is the square root of OBM's saliency, so at `scope: tensor` both keep the same positions.
    For E[x^2] = (1, 4, 0, 9) the row (4, -3, 1, 1) scores (4, 6, 0, 3).
    """
    return deltas.abs() if second_moment is None else deltas.abs() * second_moment.sqrt()
