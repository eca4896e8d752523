"""Which method to start with, by what a user has: what `merger init` writes and `merger methods` shows first.

A share kept is that of the method's defaults: of three experts' gains over a 135M base on held-out text. The test holds
it to the table in ``source``, a file of the repository.
"""

from __future__ import annotations

from dataclasses import dataclass

ZOO = "benchmarks/zoo-135M_202611.md"
REGRESSION = "benchmarks/regression-135M_202611.md"


@dataclass(frozen=True)
class Recommendation:
    """A method for a purpose, with the reason and the share of the experts' gains that it kept, if measured."""

    purpose: str
    method: str
    reason: str
    share: float | None = None  # None: not measured
    source: str | None = None

    @property
    def evidence(self) -> str:
        """The measured share in words."""
        if self.share is None:
            return "the share of the experts' gains that it keeps has not been measured"
        return f"it kept {self.share:.3f} of three experts' gains on a 135M model ({self.source})"


TEXT = Recommendation(
    "text of each expert",
    "featcal",
    "fits each layer's outputs to those of each expert on its text",
    share=0.936,
    source=REGRESSION,
)
TIME = Recommendation(
    "text of each expert, and time",
    "distill",
    "learns each block from the experts' outputs of it; some three times as long, and memory for a block's gradients",
    share=0.949,
    source=REGRESSION,
)
WEIGHTS = Recommendation(
    "the weights alone",
    "wudi_svc",
    "interferes least with what each expert changed, and counts nothing twice",
    share=0.916,
    source=REGRESSION,
)
ADAPTERS = Recommendation(
    "LoRA adapters", "wudi_svc", "takes an adapter like a fine-tune: {model: BASE, adapter: FOLDER}"
)
MANY = Recommendation(
    "many checkpoints, or little memory",
    "multislerp",
    "streams slices of a tensor, and takes the mean direction and length of the changes",
    share=0.759,
    source=ZOO,
)
QUICK = Recommendation(
    "a quick first merge",
    "linear",
    "is the plain average: one pass, exact on every device, the mark that others have to beat",
    share=0.663,
    source=REGRESSION,
)
RECOMMENDATIONS = (TEXT, TIME, WEIGHTS, ADAPTERS, MANY, QUICK)

SAMPLES = 20
"""Texts of each expert that `merger init` asks for."""
SAMPLES_REASON = f"regmean kept 0.843 of the gains with 20 texts, and 0.846 with 200 ({ZOO})"
