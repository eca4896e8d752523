"""Elect, mask, rescale: one task vector for all experts, a bit mask for each. EMR-Merging, https://arxiv.org/abs/2405.17461."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from merger._lazy import torch
from merger.ops.arithmetic import keep, summed
from merger.ops.questions import Flow, Sum, Whole
from merger.pipeline.registry import Form, pack

if TYPE_CHECKING:
    from torch import Tensor


def _forms(**_: object) -> dict[str, Form]:
    return {"unified": Form("weights", shared=True), "mask": Form("bits"), "rescale": Form("floats")}


def _rebuilt(unified: Tensor, mask: Tensor, rescale: Tensor) -> Tensor:
    return keep(unified, mask) * rescale


@pack(forms=_forms, unpack=_rebuilt, exact=False)
def emr(
    deltas: Tensor, *, scope: Whole = "global", zero_sign: Literal["zero", "negative"] = "zero"
) -> Flow[dict[str, Tensor]]:
    """Keeps for all experts the largest change of the elected sign, for each where its own has that sign, and a scale.

    The sign elected at a position is that of the sum of all changes; where that is exactly 0 none is, or - as in the
    authors' code. The scale gives an expert, over the whole model or the tensor, the mean size that its changes had.
    (4, -3) and (-2, -4) make (4, -4); the first expert keeps both at 7/8: (3.5, -3.5), the second the last at 6/4.
    """
    elected = summed(deltas).sign()
    if zero_sign == "negative":
        elected = elected.where(elected != 0, -1)
    agreeing = deltas.sign() == elected
    unified = elected * keep(deltas.abs(), agreeing).amax(0)
    mask = agreeing & (unified != 0)
    sizes = yield Sum(deltas.double().abs().sum((1, 2)), scope)
    unified_sizes = yield Sum((unified.double().abs() * mask).sum((1, 2)), scope)
    rescale = torch.where(unified_sizes > 0, sizes / unified_sizes.where(unified_sizes > 0, 1), 0)
    return {"unified": unified, "mask": mask, "rescale": rescale.float()}
