"""Every expert keeps its own: what TSV-Compress does with what is no matrix. https://arxiv.org/abs/2412.00081."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.pipeline.registry import Form, pack

if TYPE_CHECKING:
    from torch import Tensor


def _forms(**_: object) -> dict[str, Form]:
    return {"own": Form("weights")}


def _rebuilt(own: Tensor) -> Tensor:
    return own


@pack(forms=_forms, unpack=_rebuilt)
def separate(deltas: Tensor) -> dict[str, Tensor]:
    """Keeps each expert's tensor as it is, bit for bit, as a head that every task has for itself."""
    return {"own": deltas}
