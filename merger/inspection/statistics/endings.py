"""Endings: whose value each position of a result has, after rounding to the output's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merger.inspection.counters.merged import MergedCounter, MergedSums
from merger.inspection.statistic import BY_EXPERT, NUMBER, floats, share, statistic

if TYPE_CHECKING:
    from torch import Tensor

LABEL = "ends there"


@statistic(
    subject="merged",
    form=NUMBER,
    unit="share",
    formula="|{result = base}| / n",
    counters=[MergedCounter],
    order=20,
    label=LABEL,
    row="base",
    in_layers=True,
)
def at_base(merged: MergedSums) -> Tensor:
    """Share of positions that end at the base's value."""
    return _shares(merged)[0]


@statistic(
    subject="merged",
    form=BY_EXPERT,
    unit="share",
    formula="|{result = expert}| / n",
    counters=[MergedCounter],
    order=30,
    label=LABEL,
    in_layers=True,
    per_expert=True,
)
def at_expert(merged: MergedSums) -> Tensor:
    """Share of positions that end at exactly one expert's value; the first of the experts that have the same value."""
    return _shares(merged)[1:-1]


@statistic(
    subject="merged",
    form=NUMBER,
    unit="share",
    formula="|{result ≠ every input}| / n",
    counters=[MergedCounter],
    order=10,
    label=LABEL,
    row="blend",
    in_layers=True,
)
def blend(merged: MergedSums) -> Tensor:
    """Share of positions that end at no single input's value."""
    return _shares(merged)[-1]


def _shares(merged: MergedSums) -> Tensor:
    return share(floats(merged.endings), merged.elements)
