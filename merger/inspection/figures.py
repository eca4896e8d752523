"""The charts of an inspection, as data: the page and the plots show the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from merger.charts import CellMap, Chart, Heatmap, LineChart, Series
from merger.charts.paint import HEAT, SERIES, series_paint
from merger.inspection.presentation import LayerColumn, columns_by_layer, present, shortened
from merger.inspection.report import Curve, Curves, Inspection, Picture, View
from merger.inspection.statistic import BY_PAIR, Statistic

NEUTRAL = SERIES - 1
"""The number of the colour of lines that are about all experts: that of texts."""


def charts_of(inspection: Inspection) -> dict[str, list[Chart]]:
    """Every figure by name, each one or more charts that belong side by side."""
    figures: dict[str, list[Chart]] = {}
    for view in inspection.views:
        figures |= {f"{view.name}.{name}": charts for name, charts in view_charts(view).items()}
    for picture in inspection.pictures:
        figures[f"{picture.view}.{picture.tensor}"] = picture_charts(picture)
    if inspection.curves is not None:
        figures |= {chart.title: [chart] for chart in curve_charts(inspection.curves)}
    return figures


def colours(experts: Iterable[str]) -> dict[str, int]:
    """The number of the colour and mark of each expert and of each pair ``A, B``, the same in all charts."""
    names = list(experts)
    return {name: i for i, name in enumerate([*names, *(f"{a}, {b}" for a, b in combinations(names, 2))])}


def view_charts(view: View) -> dict[str, list[Chart]]:
    """The figures of one view: pairs of experts, series, and every statistic by layer."""
    pairs, series = pair_charts(view), series_charts(view)
    figures = {"pairs": pairs} if pairs else {}
    return figures | {chart.title: [chart] for chart in series} | by_layer(view)


# --- the whole model ------------------------------------------------------------------------------


def pair_charts(view: View) -> list[Chart]:
    """The numbers of every pair of experts; none where there are no pairs."""
    return [_pair_chart(entry, getattr(view.whole, entry.name)) for entry in present(view) if entry.form is BY_PAIR]


def _pair_chart(entry: Statistic, pairs: Mapping[str, Mapping[str, float]]) -> Heatmap:
    roles = "" if entry.symmetric else " A is the row's expert, B the column's."
    rows = {name: {peer: row.get(peer) for peer in pairs} for name, row in pairs.items()}
    return Heatmap(entry.title, entry.explanation + roles, list(pairs), rows)


def series_charts(view: View) -> list[Chart]:
    """Each series of more than two numbers as a line."""
    charts: list[Chart] = []
    for entry in present(view):
        values = getattr(view.whole, entry.name)
        if entry.axis is not None and len(values) > 2:
            points = list(zip(entry.axis.points(len(values) - 1), values, strict=True))
            charts.append(LineChart(entry.title, entry.explanation, entry.axis.name, [Series("", points, NEUTRAL)]))
    return charts


def curve_charts(curves: Curves) -> list[Chart]:
    """Overlap and balance against density, of the whole model and of each kind of tensor that has matrices."""
    kinds = {kind: curve for kind, curve in curves.kinds.items() if any(map(any, curve.uneven_rows.values()))}
    parts = {"": curves.whole, **({f", kind {kind}": curve for kind, curve in kinds.items()} if len(kinds) > 1 else {})}
    return [chart for suffix, curve in parts.items() for chart in _curve_charts(suffix, curve)]


def _curve_charts(suffix: str, curve: Curve) -> list[Chart]:
    """The pairs that overlap most, and the experts' balance: magnitude as a line, random masks dashed."""
    numbers = colours(curve.uneven_rows)
    caption = "solid: the largest by magnitude; dashed: as many of the changed positions at random"
    pairs = sorted(combinations(curve.uneven_rows, 2), key=lambda pair: -sum(curve.overlap[pair[0]][pair[1]]))
    overlap = {f"{a}, {b}": (curve.overlap[a][b], curve.overlap_random[a][b]) for a, b in pairs}
    uneven = {name: (values, curve.uneven_rows_random[name]) for name, values in curve.uneven_rows.items()}
    title = f"against density{suffix}"
    charts: list[Chart] = []
    if overlap:
        lines = _magnitude_and_random(curve.densities, overlap, numbers)
        charts.append(LineChart(f"overlap {title}", caption, "density", lines, top=1.0, diagonal=True))
    lines = _magnitude_and_random(curve.densities, uneven, numbers)
    return [*charts, LineChart(f"uneven rows {title}", caption, "density", lines)]


def _magnitude_and_random(
    densities: Sequence[float],
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    numbers: Mapping[str, int],
) -> list[Series]:
    lines = []
    for name, (magnitude, random) in list(curves.items())[:SERIES]:
        number = numbers[name]
        lines.append(Series("", list(zip(densities, random, strict=True)), number, "dashed"))
        lines.append(Series(name, list(zip(densities, magnitude, strict=True)), number))
    return lines


def picture_charts(picture: Picture) -> list[Chart]:
    """The map of a tensor's positions, of each expert by itself."""
    top = max(value for rows in picture.density.values() for row in rows for value in row)
    caption = f"{picture.tensor} ({picture.view}): density in equal cells of the matrix"
    return [
        CellMap(name, caption, rows, (0.0, top), paint=series_paint(i))
        for i, (name, rows) in enumerate(picture.density.items())
    ]


# --- by layer and projection ----------------------------------------------------------------------


def by_layer(view: View) -> dict[str, list[Chart]]:
    """Each statistic of every block's large tensors, of its small ones, and of the tensors outside any block."""
    charts: dict[str, list[Chart]] = {}
    for entry in present(view):
        for column in columns_by_layer(entry, view):
            charts[column.name] = _layer_charts(view, column)
    return charts


def _layer_charts(view: View, statistic: LayerColumn) -> list[Chart]:
    short = shortened(view.cells)
    paint = HEAT if statistic.expert is None else series_paint(statistic.expert)
    blocks = {short[layer]: cells for layer, cells in view.cells.items() if layer not in view.tensors}
    outer = {short[layer]: cells for layer, cells in view.cells.items() if layer in view.tensors}
    charts: list[Chart] = []
    for title, columns in zip(
        (statistic.name, f"{statistic.name} of small tensors"), _by_size(blocks.values()), strict=True
    ):
        rows = {
            layer: {column: statistic.number(cells[column]) if column in cells else None for column in columns}
            for layer, cells in blocks.items()
        }
        charts += [Heatmap(title, statistic.caption, columns, rows, paint)] if columns else []
    if outer:
        rows = {layer: {statistic.name: statistic.number(next(iter(cells.values())))} for layer, cells in outer.items()}
        title = f"{statistic.name} outside the blocks"
        charts.append(Heatmap(title, statistic.caption, [statistic.name], rows, paint))
    return charts


def _by_size(layers: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The projections with many elements, and those with less than a hundredth of the largest's: norms, biases.

    A chart of their own keeps the wide scatter of the small ones out of the colours of the others.
    """
    elements: dict[str, int] = {}
    for cells in layers:
        for projection, values in cells.items():
            elements[projection] = max(elements.get(projection, 0), values.elements)
    limit = max(elements.values(), default=0) / 100
    return [p for p, n in elements.items() if n >= limit], [p for p, n in elements.items() if n < limit]
