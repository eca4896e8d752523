"""From counts to the result: sums added up over tensors, layers, projections and kinds, and the statistics of each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeVar

from merger.inspection.counters import Subject, Sums, SumsByCounter
from merger.inspection.counters.merged import MergedCounter, MergedSums
from merger.inspection.counters.vectors import VectorCounter, VectorSums
from merger.inspection.curves import DENSITIES, CurveSums
from merger.inspection.part_counts import PartCounts
from merger.inspection.report import Curve, Curves, CurvesByExpert, CurvesByPair, Facts, Merged, Picture, View
from merger.inspection.request import ViewKey
from merger.inspection.statistic import BY_EXPERT, BY_PAIR, array, share, statistics
from merger.planning.plan import Part, TensorPlan

T = TypeVar("T")
Work = Sequence[tuple[TensorPlan, Part, PartCounts]]


def views_of(work: Work, experts: Sequence[str]) -> list[View]:
    """The statistics of every view, in the order of the pipeline."""
    sums_by_view: dict[ViewKey, list[tuple[TensorPlan, SumsByCounter]]] = defaultdict(list)
    for tensor, _, counts in work:
        for key, sums in counts.sums.items():
            sums_by_view[key].append((tensor, sums))
    return [_view(key, sums_by_view[key], experts) for key in sorted(sums_by_view)]


def pictures_of(work: Work, picture: str | None, experts: Sequence[str]) -> list[Picture]:
    """The map of one tensor in each view of the experts; of packed experts, the first."""
    counts = next((counts for tensor, _, counts in work if tensor.name == picture), None)
    if counts is None:
        return []
    return [
        Picture(counts.part.name, key.name, dict(zip(experts, counts.density_by_cell(key), strict=True)))
        for key in sorted(counts.cells)
    ]


def curves_of(work: Work, experts: Sequence[str]) -> Curves | None:
    """The curves of the whole model and of each kind of tensor; None unless they were counted."""
    curves = [(tensor, counts.curves) for tensor, _, counts in work if counts.curves is not None]
    if not curves:
        return None
    model = reduce(add, (sums for _, sums in curves))
    kinds = _totals(curves, lambda tensor: tensor.kind, add)
    return Curves(curve_of(model, experts), {kind: curve_of(sums, experts) for kind, sums in kinds.items()})


def statistics_of(subject: Subject, sums: SumsByCounter, experts: Sequence[str]) -> Facts | Merged:
    """The value of every declared statistic of the subject; None where a view or a tensor has none."""
    values = {entry.name: entry.value(sums, experts) for entry in statistics(subject)}
    if subject == "experts":
        vectors = sums[VectorCounter]
        assert isinstance(vectors, VectorSums)
        return Facts(vectors.elements, **values)
    merged = sums[MergedCounter]
    assert isinstance(merged, MergedSums)
    return Merged(merged.elements, **values)


def curve_of(sums: CurveSums, experts: Sequence[str]) -> Curve:
    """Overlap and balance at each density."""
    positions = array(sums.positions)[:, None]

    def by_pair(joint: Any) -> CurvesByPair:
        curves: CurvesByPair = BY_PAIR.render(share(array(joint), positions), experts)
        return curves

    def by_expert(unevenness: Any) -> CurvesByExpert:
        curves: CurvesByExpert = BY_EXPERT.render(share(array(unevenness), sums.matrix_elements), experts)
        return curves

    return Curve(
        densities=[float(density) for density in DENSITIES],
        overlap=by_pair(sums.joint),
        overlap_random=by_pair(sums.joint_random),
        uneven_rows=by_expert(sums.unevenness),
        uneven_rows_random=by_expert(sums.unevenness_random),
    )


def projection_of(tensor: TensorPlan) -> str:
    """A tensor's name within its block, numbers as *: self_attn.q_proj, mlp.experts.*.w1; outside blocks, all of it."""
    name = tensor.name.removeprefix(f"{tensor.unit}.").removesuffix(".weight")
    return re.sub(r"(?<![a-zA-Z_])\d+(?=\.|$)", "*", name)


def _view(key: ViewKey, sums_by_tensor: Sequence[tuple[TensorPlan, SumsByCounter]], experts: Sequence[str]) -> View:
    def by(group: Callable[[TensorPlan], Any]) -> dict[Any, Facts | Merged]:
        totals = _totals(sums_by_tensor, group, _add_sums)
        return {name: statistics_of(key.subject, sums, experts) for name, sums in totals.items()}

    cells: dict[str, dict[str, Facts | Merged]] = defaultdict(dict)
    for (layer, projection), values in by(lambda tensor: (tensor.unit, projection_of(tensor))).items():
        cells[layer][projection] = values
    return View(
        name=key.name,
        about=key.subject,
        whole=by(lambda tensor: None)[None],
        kinds=by(lambda tensor: tensor.kind),
        layers=by(lambda tensor: tensor.unit),
        projections=by(projection_of),
        cells=dict(cells),
        tensors=by(lambda tensor: tensor.name),
    )


def _totals(
    values: Iterable[tuple[TensorPlan, T]], group: Callable[[TensorPlan], Any], join: Callable[[T, T], T]
) -> dict[Any, T]:
    """Values joined within each group of tensors."""
    totals: dict[Any, T] = {}
    for tensor, value in values:
        name = group(tensor)
        totals[name] = join(totals[name], value) if name in totals else value
    return totals


def _add_sums(total: SumsByCounter, term: SumsByCounter) -> SumsByCounter:
    sums: dict[Any, Sums] = {counter: total[counter] + term[counter] for counter in total}
    return sums
