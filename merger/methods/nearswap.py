"""Take what is near. Nearswap, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.

Written there as an interpolation by min(1, t / |delta|), which is the task vector clamped to t.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from merger.pipeline.parameters import Number
from merger.pipeline.registry import merger

if TYPE_CHECKING:
    from torch import Tensor


def _no_less_than_nothing(t: Fraction, **_: object) -> None:
    if t < 0:
        raise ValueError(f"t is {float(t):g}, expected at least 0: it is the furthest that a weight may move")


@merger(experts=1, check=_no_less_than_nothing)
def nearswap(deltas: Tensor, *, t: Number = 0.0001) -> Tensor:
    """Takes the expert's weights that lie within `t` of the base's, and goes `t` towards the others.

    At 2, the task vector (4, -3, 1, 0) becomes (2, -2, 1, 0).
    """
    return deltas[0].clamp(-float(t), float(t))
