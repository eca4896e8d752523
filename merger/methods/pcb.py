"""PCB-Merging: parameters compete within and between models. https://arxiv.org/abs/2410.02396."""

from __future__ import annotations

from typing import Literal

from merger.methods.pcb_official import pcb_official
from merger.methods.pcb_paper import pcb_paper
from merger.methods.scale import scale
from merger.ops.questions import Whole
from merger.pipeline.parameters import Number, Shares
from merger.pipeline.registry import Stage, method, stage


@method()
def pcb(
    *,
    variant: Literal["paper", "official"] = "paper",
    density: Shares = 0.1,
    lambda_: Number = 1,
    scope: Whole = "global",
) -> list[Stage]:
    """Weights every parameter by how far it stands out in its model and goes with the others; the rest drops out.

    `variant` chooses the paper's formula or that of the authors' code, which differ.
    """
    balanced = pcb_paper if variant == "paper" else pcb_official
    return [stage(balanced, density=density, scope=scope), stage(scale, lambda_=lambda_)]
