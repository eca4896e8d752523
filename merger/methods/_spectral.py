"""What methods of whole matrices have in common: they see a matrix at once, and only matrices."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.methods.plain_mean import plain_mean
from merger.methods.scale import scale
from merger.methods.sum import sum_
from merger.ops.arithmetic import column
from merger.pipeline.registry import Stage, Takes, stage

if TYPE_CHECKING:
    from torch import Tensor


def whole(**_: object) -> Takes:
    """Such a stage takes the whole oriented matrix, whatever its parameters."""
    return "matrix"


def runs(**_: object) -> Takes:
    """Such a stage takes an oriented matrix in runs of many rows, for sums over them tell it the rest."""
    return "runs"


def has_matrix(kind: str, *, head: bool = False) -> bool:
    """Whether a tensor of this kind maps activations to activations; the head, tied or not, does only with ``head``."""
    return kind in ("linear", "conv1d", "expert3d") or (head and kind in ("head", "tied"))


def averaged(kind: str, *, head: bool, weight: Any, lambda_: Any, **_: object) -> list[Stage] | None:
    """Tensors without a matrix get the mean of the task vectors, times the method's own scale."""
    if has_matrix(kind, head=head):
        return None
    return [stage(plain_mean, weight=weight), stage(scale, lambda_=lambda_)]


def left_at_base(kind: str, *, head: bool, **_: object) -> list[Stage] | None:
    """Tensors without a matrix are not merged."""
    return None if has_matrix(kind, head=head) else [stage(sum_), stage(scale, lambda_=0)]


TIES = {"ties": {"density": 1}}
"""The method that merges in turned directions unless a recipe names another."""

ROUNDING = 2.0**-24
"""Share of a task vector's norm up to which a turned value is rounding: no expert has a vote by such a value."""


def inner_alone(kind: str, *, head: bool, inner: Stage) -> list[Stage] | None:
    """Tensors without a matrix get the method that merges matrices in turned directions, as it stands."""
    return None if has_matrix(kind, head=head) else [inner]


def negligible_as_zero(turned: Tensor, norms: Tensor) -> Tensor:
    """Sets turned values to 0, in place, that are rounding beside ``norms`` of the task vectors that they are of."""
    return turned.masked_fill_(turned.abs() <= ROUNDING * norms, 0)


def untouched(kind: str, *, head: bool, **_: object) -> list[Stage] | None:
    """A sparsifier of matrices leaves other tensors as they are."""
    return None if has_matrix(kind, head=head) else []


def weighted(deltas: Tensor, weight: Sequence[Fraction]) -> Tensor:
    """Each task vector times its weight, as a float64 copy."""
    exact = deltas.to(torch.float64, copy=True)
    return exact.mul_(column(weight, exact))
