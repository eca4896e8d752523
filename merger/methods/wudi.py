"""Interfere least with what each expert changed. WUDI, https://arxiv.org/abs/2503.08099; docs/methods/wudi.md.

The rows of a task vector span the inputs that it was trained on, so the task vectors' own Gram matrices
stand in for those of the inputs. The paper takes a few hundred small steps of Adam from the sum towards
the optimum; this is the optimum itself, with a ridge that keeps small eigenvalues from being inverted.
Of a 135M model's three fine-tunes it kept 0.867, 0.895, 0.897, 0.882 and 0.809 of the gain with `omega` at 0.03,
0.1, 0.3, 1 and 10 (eight held-out texts a domain).
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from merger._lazy import torch
from merger.methods._spectral import averaged, weighted, whole
from merger.ops.linalg import gram
from merger.pipeline.parameters import Number, Numbers
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor

RCOND = 1e-6
"""Without a ridge, eigenvalues up to this share of the largest are not inverted."""


def _not_negative(omega: Fraction, **_: object) -> None:
    if omega < 0:
        raise ValueError(f"omega is {float(omega):g}, but a ridge cannot be negative")


@merger(exact=False, takes=whole, check=_not_negative, elsewhere=averaged)
def wudi(
    deltas: Tensor,
    *,
    omega: Number = 0.3,
    ridge: Literal["relative", "absolute"] = "relative",
    weight: Numbers = 1,
    lambda_: Number = 1,
    head: bool = False,
) -> Tensor:
    """Minimizes the interference of the merged task vector with every expert's in closed form.

    That is the sum of (||(tau - delta_k) delta_k^T||^2 + rho_k ||tau - delta_k||^2) / ||delta_k||^2. The ridge
    rho_k is `omega` times the mean eigenvalue of delta_k^T delta_k with `ridge: relative`, so that `omega` has no unit
    and a large one gives the mean; with `ridge: absolute` it is `omega` itself, as in the paper's equation 20,
    in squared weights. Vectors and embeddings (and the head, unless `head`) get the mean. (1, 0) and (0, 1) in the
    same row make (1, 1) without the ridge, (0.75, 0.75) at 1.
    """
    terms: list[Tensor] = [vector for vector in weighted(deltas, weight) if vector.any()]  # unchanged ones have no say
    if not terms:
        return torch.zeros_like(deltas[0])
    first = terms[0]
    columns = first.shape[1]
    total, products = first.new_zeros(columns, columns), torch.zeros_like(first)
    for term in terms:
        squares = term.square().sum()
        importance = gram(term.T).div_(squares)
        importance.diagonal().add_(float(omega) / (columns if ridge == "relative" else squares))
        total += importance
        products += (term - first) @ importance
    # from the first on, so that equal task vectors come back bit for bit
    return ((first + _divided(products, total, regular=omega > 0)) * float(lambda_)).to(deltas)


def _divided(rows: Tensor, by: Tensor, *, regular: bool) -> Tensor:
    """rows @ by^-1 for a symmetric matrix, by its pseudo-inverse where it may be singular."""
    factor, failed = torch.linalg.cholesky_ex(by)
    if regular and not failed:
        solved: Tensor = torch.cholesky_solve(rows.T, factor)
        return solved.T
    inverse: Tensor = torch.linalg.pinv(by, rtol=RCOND, hermitian=True)
    return rows @ inverse
