"""What there is to draw of an inspection, as data: `page` and `plots` draw the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from merger.inspection.report import ByPair, Curve, Curves, Facts, Merged, View
from merger.inspection.tables import most, shortened

LINES = 6
"""Lines of a chart: more cannot be told apart. The pairs that overlap most are drawn."""

OF_EXPERTS = {
    "overlap": "of what one expert keeps, the share that another keeps too; the largest of all pairs",
    "sign_conflict": "of what two experts keep, the share where their signs differ; the largest of all pairs",
    "density": "share of positions that are not zero; the densest expert",
    "norm": "euclidean length of the task vector; the longest",
    "uneven_rows": "standard deviation over mean of what the rows keep; the most uneven expert",
    "uneven_columns": "standard deviation over mean of what the columns keep; the most uneven expert",
    "uneven_blocks": "standard deviation over mean of what each 256 elements in a row keep; the most uneven expert",
    "distinct": "how many different values other than zero there are; the expert with most",
    "effective_rank": "e to the entropy of the singular values as shares; the expert with the highest",
}
OF_PAIRS = ("overlap", "sign_conflict")


@dataclass(frozen=True)
class Heatmap:
    """Numbers by row and column; ``across`` where the columns' names are short."""

    name: str
    what: str
    columns: Sequence[str]
    rows: Mapping[str, Mapping[str, float | None]]
    across: bool = False

    @property
    def span(self) -> tuple[float, float]:
        """The least and the greatest number."""
        values = [value for row in self.rows.values() for value in row.values() if value is not None]
        return min(values), max(values)


@dataclass(frozen=True)
class Line:
    """What magnitude does at each density, and random masks beside it."""

    name: str
    magnitude: Sequence[float]
    random: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """Lines against density; ``diagonal`` where random masks over all positions would have the density itself."""

    name: str
    what: str
    densities: Sequence[float]
    lines: Sequence[Line]
    diagonal: bool = False

    @property
    def top(self) -> float:
        """The greatest number."""
        return max(value for line in self.lines for value in (*line.magnitude, *line.random))


# --- the whole model ------------------------------------------------------------------------------


def matrices(view: View) -> list[Heatmap]:
    """The numbers of every pair of experts; none where there are no pairs."""
    whole = view.whole
    if not isinstance(whole, Facts) or len(whole.norm) < 2:
        return []
    return [
        _matrix("overlap", "of what the row's expert keeps, the share that the column's keeps too", whole.overlap),
        _matrix("sign conflict", "of what both keep, the share where their signs differ", whole.sign_conflict),
        _matrix("cosine", "between task vectors", whole.cosine),
    ]


def _matrix(name: str, what: str, pairs: ByPair) -> Heatmap:
    return Heatmap(
        name, what, list(pairs), {one: {other: pairs[one].get(other) for other in pairs} for one in pairs}, True
    )


def charts(curves: Curves) -> list[Chart]:
    """Overlap and balance against density, of the whole model and of each kind of tensor that has matrices."""
    kinds = {kind: curve for kind, curve in curves.kinds.items() if any(map(any, curve.uneven_rows.values()))}
    shown = {"": curves.whole, **({f", kind {kind}": each for kind, each in kinds.items()} if len(kinds) > 1 else {})}
    return [chart for where, curve in shown.items() for chart in _charts(where, curve)]


def _charts(where: str, curve: Curve) -> list[Chart]:
    pairs = sorted(combinations(curve.uneven_rows, 2), key=lambda pair: -sum(curve.overlap[pair[0]][pair[1]]))
    overlap = [Line(f"{a}, {b}", curve.overlap[a][b], curve.overlap_random[a][b]) for a, b in pairs[:LINES]]
    uneven = [Line(name, own, curve.uneven_rows_random[name]) for name, own in curve.uneven_rows.items()][:LINES]
    drawn = "solid: the largest by magnitude; dashed: as many of the changed positions at random"
    return [
        *(
            [Chart(f"overlap against density{where}", drawn, curve.densities, overlap, diagonal=True)]
            if overlap
            else []
        ),
        Chart(f"uneven rows against density{where}", drawn, curve.densities, uneven),
    ]


# --- by layer and projection ----------------------------------------------------------------------


def by_layer(view: View) -> dict[str, list[Heatmap]]:
    """Each statistic of every block's large tensors, of its small ones, and of the tensors outside any block."""
    return {name: _layers(view, name, what, find) for name, what, find in _statistics(view.whole)}


Statistic = tuple[str, str, Callable[[Any], float]]
"""What it is called, what it is, and how it is found."""


def _statistics(whole: Facts | Merged) -> list[Statistic]:
    if isinstance(whole, Merged):
        return _of_merged(whole)

    def of(name: str, what: str) -> Statistic:
        return name.replace("_", " "), what, lambda facts: most(getattr(facts, name))

    absent = {
        *(() if len(whole.norm) > 1 else OF_PAIRS),
        *(("effective_rank",) if whole.effective_rank is None else ()),
    }
    return [of(name, what) for name, what in OF_EXPERTS.items() if name not in absent]


def _of_merged(whole: Merged) -> list[Statistic]:
    def of(name: str) -> Statistic:
        return f"at {name}", f"share of positions that end at {name}'s value", lambda f: float(f.at_expert[name])

    return [
        ("blend", "share of positions that end at no single input's value", lambda f: float(f.blend)),
        ("at the base", "share of positions that end at the base's value", lambda f: float(f.at_base)),
        *map(of, whole.at_expert),
        ("norm", "euclidean length of the merged task vector", lambda f: float(f.norm)),
    ]


def _layers(view: View, name: str, what: str, find: Callable[[Any], float]) -> list[Heatmap]:
    short = shortened(view.cells)
    inside = {short[layer]: cells for layer, cells in view.cells.items() if layer not in view.tensors}
    outside = {short[layer]: cells for layer, cells in view.cells.items() if layer in view.tensors}
    maps = []
    for title, columns in zip((name, f"{name} of small tensors"), _by_size(inside.values()), strict=True):
        rows = {
            layer: {each: find(cells[each]) if each in cells else None for each in columns}
            for layer, cells in inside.items()
        }
        maps += [Heatmap(title, what, columns, rows)] if columns else []
    alone = {layer: {name: find(next(iter(cells.values())))} for layer, cells in outside.items()}
    return maps + ([Heatmap(f"{name} outside the blocks", what, [name], alone, across=True)] if alone else [])


def _by_size(layers: Iterable[Mapping[str, Facts | Merged]]) -> tuple[list[str], list[str]]:
    """The projections with many elements and those with less than a hundredth of the largest's: norms, biases.

    A figure of their own keeps the small ones' wide scatter out of the others' colours.
    """
    elements: dict[str, int] = {}
    for cells in layers:
        for projection, facts in cells.items():
            elements[projection] = max(elements.get(projection, 0), facts.elements)
    few = max(elements.values(), default=0) / 100
    return [p for p, n in elements.items() if n >= few], [p for p, n in elements.items() if n < few]
