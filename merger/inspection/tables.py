"""The tables of an inspection, as data: the terminal and the page show the same, the worst first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from merger import display
from merger.charts.drawing import number_text
from merger.inspection.presentation import columns_by_layer, present, shortened
from merger.inspection.report import Curve, Facts, Merged, View
from merger.inspection.statistic import BY_PAIR, NUMBER, Unit


@dataclass(frozen=True)
class Column:
    """A column of numbers; rows without a number are empty."""

    heading: str
    unit: Unit
    numbers: Mapping[str, float]
    full: float = 1.0  # the number of a full bar
    explanation: str = ""


@dataclass(frozen=True)
class Table:
    """Numbers by row and column."""

    heading: str  # of the column with the rows' names
    rows: Sequence[str]
    columns: Sequence[Column]


def display_table(table: Table, swatches: Mapping[str, str] = {}) -> display.Table:
    """The table with its numbers as texts; ``swatches`` are the colours of rows by name."""
    columns = [display.Column(column.heading, explanation=column.explanation) for column in table.columns]
    rows = [
        display.Row(
            [display.Cell(name), *(_cell(column, column.numbers.get(name)) for column in table.columns)],
            swatch=swatches.get(name, ""),
        )
        for name in table.rows
    ]
    return display.Table([display.Column(table.heading), *columns], rows)


def _cell(column: Column, number: float | None) -> display.Cell:
    """A number; of a share with a bar."""
    if number is None:
        return display.Cell()
    text = f"{number:+.3f}" if column.unit == "cosine" else number_text(number)
    return display.Cell(text, number / (column.full or 1) if column.unit == "share" else None)


def expert_table(view: View, experts: Sequence[str]) -> Table:
    """The numbers of each expert, and of the whole beside them; of a merged vector the base is a row too."""
    columns: dict[str, Column] = {}
    for entry in present(view):
        if entry.axis is None and entry.form is not BY_PAIR:
            value = getattr(view.whole, entry.name)
            numbers = {entry.row: value} if entry.form is NUMBER else value
            column = columns.get(entry.label, Column(entry.label, entry.unit, {}))
            explanation = f"{column.explanation} {entry.explanation}".strip()
            columns[entry.label] = replace(column, numbers={**column.numbers, **numbers}, explanation=explanation)
    names = dict.fromkeys(name for column in columns.values() for name in column.numbers)
    inputs = [name for name in ("base", *experts) if name in names]
    return Table(view.name, [*inputs, *(name for name in names if name not in inputs)], list(columns.values()))


def pair_table(view: View, experts: Sequence[str]) -> Table | None:
    """The numbers of each pair, the pair that overlaps most first; A is the expert of which more is shared."""
    entries = [entry for entry in present(view) if entry.form is BY_PAIR]
    if not entries:
        return None
    first = getattr(view.whole, entries[0].name)
    pairs = [max((a, b), (b, a), key=lambda pair: first[pair[0]][pair[1]]) for a, b in combinations(experts, 2)]
    pairs.sort(key=lambda pair: -first[pair[0]][pair[1]])
    columns = []
    for entry in entries:
        value = getattr(view.whole, entry.name)
        numbers = {f"{a}, {b}": value[a][b] for a, b in pairs}
        reverse = {f"{a}, {b}": value[b][a] for a, b in pairs}
        headings = [entry.label] if entry.symmetric else [f"{entry.label}\nA, B", f"{entry.label}\nB, A"]
        columns += [
            Column(heading, entry.unit, column) for heading, column in zip(headings, (numbers, reverse), strict=False)
        ]
    return Table(f"A, B ({view.name})", [f"{a}, {b}" for a, b in pairs], columns)


def series_tables(view: View) -> list[Table]:
    """Every series, those of the same axis side by side."""
    tables: dict[str, Table] = {}
    for entry in present(view):
        if entry.axis is not None:
            values = getattr(view.whole, entry.name)
            points = [f"{point:g}" for point in entry.axis.points(len(values) - 1)]
            table = tables.get(entry.axis.name, Table(f"{entry.axis.name} ({view.name})", points, []))
            column = Column(entry.label, entry.unit, dict(zip(points, values, strict=True)))
            tables[entry.axis.name] = replace(table, columns=[*table.columns, column])
    return list(tables.values())


def curve_table(curve: Curve) -> Table:
    """The pair that overlaps most and the most uneven expert by density, beside random masks."""
    expert = max(curve.uneven_rows, key=lambda name: sum(curve.uneven_rows[name]))
    columns = [(f"uneven rows\n{expert}", curve.uneven_rows[expert]), ("\nat random", curve.uneven_rows_random[expert])]
    pairs = combinations(curve.uneven_rows, 2)
    pair = max(pairs, key=lambda pair: sum(curve.overlap[pair[0]][pair[1]]), default=None)
    if pair is not None:
        a, b = pair
        columns = [(f"overlap\n{a}, {b}", curve.overlap[a][b]), ("\nat random", curve.overlap_random[a][b]), *columns]
    rows = [f"{density:.2f}" for density in curve.densities]
    columns_by_density = [Column(heading, "share", dict(zip(rows, values, strict=True))) for heading, values in columns]
    return Table("largest by\nmagnitude", rows, columns_by_density)


def layer_table(view: View, title: str, groups: Mapping[str, Facts | Merged]) -> Table:
    """The statistics of each layer or projection that tables by layer have, the worst by the first of them on top.

    Those that the user asked for come second, so that a narrow table has them too.
    """
    entries = [entry for entry in present(view) if entry.in_layers]
    entries = sorted(entries, key=lambda entry: (entry is not entries[0], entry.request is None))
    short = shortened(groups)
    columns = []
    for entry in entries:
        for layer_column in columns_by_layer(entry, view):
            numbers = {short[name]: layer_column.number(values) for name, values in groups.items()}
            heading = layer_column.name.removeprefix("at ")
            present_numbers = {name: number for name, number in numbers.items() if number is not None}
            columns.append(
                Column(heading, layer_column.unit, present_numbers, max(present_numbers.values(), default=1.0))
            )
    worst = columns[0].numbers
    rows = sorted(short.values(), key=lambda name: -worst.get(name, 0.0))
    return Table(f"{title} ({view.name})", rows, columns)
