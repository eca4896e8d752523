"""TALL masks: the sum of all task vectors, and where each expert is in it. https://arxiv.org/abs/2405.07813."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.methods.consensus import tall_mask
from merger.ops.arithmetic import keep, summed
from merger.pipeline.parameters import Numbers
from merger.pipeline.registry import Form, pack

if TYPE_CHECKING:
    from torch import Tensor


def _forms(**_: object) -> dict[str, Form]:
    return {"unified": Form("weights", shared=True), "mask": Form("bits")}


def _rebuilt(unified: Tensor, mask: Tensor) -> Tensor:
    return keep(unified, mask)


@pack(forms=_forms, unpack=_rebuilt)
def tall_masks(deltas: Tensor, *, lambda_t: Numbers = 0.4) -> dict[str, Tensor]:
    """Keeps the sum of the task vectors for all experts, and for each the positions that are more its own than others'.

    An expert holds a position where its change is at least `lambda_t` times what the others add to it.
    (3, 0) and (1, 4) sum to (4, 4), of which at 0.4 the first keeps (4, 0) and the second (0, 4).
    """
    unified = summed(deltas)
    return {"unified": unified, "mask": tall_mask(deltas, unified, lambda_t)}
