"""Interfere least with what each expert changed. WUDI, https://arxiv.org/abs/2503.08099; docs/methods/wudi.md.

The rows of a task vector span the inputs that it was trained on, so the task vectors' own Gram matrices
stand in for those of the inputs. The paper takes a few hundred small steps of Adam from the sum towards
the optimum; this is the optimum itself, with a filter that keeps small eigenvalues from being inverted
(SWUDI, https://arxiv.org/abs/2606.07289).
Of a 135M model's three fine-tunes it kept 0.867, 0.895, 0.897, 0.882 and 0.809 of the gain with `omega` at 0.03,
0.1, 0.3, 1 and 10 (eight held-out texts a domain).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Literal

from merger._lazy import torch
from merger.methods._regression import Evidence, Filter
from merger.methods._spectral import averaged, runs, weighted
from merger.ops.linalg import gram
from merger.ops.questions import Flow, MatrixSums, Size
from merger.pipeline.parameters import Number, Numbers, Towards
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor

RCOND = 1e-6
"""Without a ridge, eigenvalues up to this share of the largest are not inverted."""


def _not_negative(omega: Fraction, **_: object) -> None:
    if omega < 0:
        raise ValueError(f"omega is {float(omega):g}, but a ridge cannot be negative")


@merger(exact=False, takes=runs, check=_not_negative, elsewhere=averaged)
def wudi(
    deltas: Tensor,
    *,
    omega: Number = 0.3,
    ridge: Literal["relative", "absolute"] = "relative",
    filter_: Filter = "ridge",
    towards: Towards = "mean",
    normalize: Literal["trace", "none"] = "trace",
    weight: Numbers = 1,
    lambda_: Number = 1,
    head: bool = False,
) -> Flow[Tensor]:
    """Minimizes the interference of the merged task vector with every expert's in closed form.

    That is the sum of (||(tau - delta_k) delta_k^T||^2 + rho_k ||tau - delta_k||^2) / ||delta_k||^2. The ridge
    rho_k is `omega` times the mean eigenvalue of delta_k^T delta_k with `ridge: relative`, so that `omega` has no unit
    and a large one gives the mean; with `ridge: absolute` it is `omega` itself, as in the paper's equation 20,
    in squared weights. Directions without evidence go `towards` the mean, the sum, a multiple of the mean, or with
    `fit` the multiple that interferes least. With `filter: exp` or `rank` an eigenvalue e of the sum of the Gram
    matrices counts 1 - exp(-e / rho) or, above rho, fully, in place of e / (e + rho). With `normalize: none` nothing is
    divided by ||delta_k||^2, so that an expert that changed more has more say. Vectors and embeddings (and the head,
    tied or not, without `head`) get the mean. (1, 0) and (0, 1) in the same row make (1, 1) without the ridge,
    (0.75, 0.75) at 1.
    """
    squares, gram_of = yield from _sums(deltas, weight)
    changed = [k for k in range(len(deltas)) if squares[k]]  # the others have no say
    if not changed:
        return torch.zeros_like(deltas[0])
    first = _exact(deltas, weight, changed[0])
    evidence, mean, rho = Evidence(first), torch.zeros_like(first), 0.0
    for k in changed:
        term = first if k == changed[0] else _exact(deltas, weight, k)
        size = float(squares[k]) if normalize == "trace" else 1.0
        evidence.add(term, gram_of(k).div_(size))
        share = float(omega) / size
        if ridge == "relative":
            share = float(omega) * (float(squares[k]) / size) / first.shape[1]
        mean.add_(term - first, alpha=share)
        rho += share
    if not omega:  # from the first on, so that equal task vectors come back bit for bit
        merged: Tensor = first + evidence.products @ torch.linalg.pinv(evidence.total, rtol=RCOND, hermitian=True)
    else:
        mean = first + mean / rho
        factor = yield from _factor(towards, evidence, mean, len(changed))
        merged = evidence.solve(mean * factor, rho, filter_)
    return (merged * float(lambda_)).to(deltas)


def _exact(deltas: Tensor, weight: Sequence[Fraction], k: int) -> Tensor:
    """The task vector [r c] of expert k times its weight, in float64: one at a time, for a head is large."""
    return weighted(deltas[k : k + 1], weight[k : k + 1])[0]


def _sums(deltas: Tensor, weight: Sequence[Fraction]) -> Flow[tuple[Tensor, Callable[[int], Tensor]]]:
    """The squares [k] of task vectors times their weights, and a function that returns expert k's Gram matrix [c c]."""
    if (yield Size()) > deltas.shape[-1] ** 2:  # it may be a run of rows, and the sums are smaller than the matrix
        grams, squares = yield MatrixSums(partial(_grams, deltas, weight))
        return squares, lambda k: grams[k].to(deltas.device, copy=True)
    squares = torch.stack([_exact(deltas, weight, k).square().sum() for k in range(len(deltas))])
    return squares, lambda k: gram(_exact(deltas, weight, k).T)


def _grams(deltas: Tensor, weight: Sequence[Fraction]) -> tuple[Tensor, Tensor]:
    """The Gram matrices [k c c] of the columns of task vectors [k r c] times their weights, and their squares [k]."""
    experts, _, columns = deltas.shape
    grams = torch.empty(experts, columns, columns, dtype=torch.float64, device=deltas.device)
    squares = torch.empty(experts, dtype=torch.float64, device=deltas.device)
    for k in range(experts):
        exact = _exact(deltas, weight, k)
        grams[k], squares[k] = gram(exact.T), exact.square().sum()
    return grams, squares


def _factor(towards: Fraction | str, evidence: Evidence, mean: Tensor, experts: int) -> Flow[float]:
    if towards == "fit":
        return (yield from evidence.fit(mean))
    if towards == "sum":
        return experts
    return 1 if towards == "mean" else float(towards)
