"""Task singular vectors, compressed. TSV-Compress, https://arxiv.org/abs/2412.00081, section 3.2.

See docs/methods/spectral.md.
"""

from __future__ import annotations

from fractions import Fraction

from merger.methods.factors import factors
from merger.pipeline.registry import Stage, method, stage


@method()
def tsv_c(experts: tuple[str, ...], *, head: bool = False) -> list[Stage]:
    """Keeps the strongest 1/K of each expert's singular directions, as factors; `factors` keeps another share."""
    return [stage(factors, rank_share=Fraction(1, len(experts)), head=head)]
