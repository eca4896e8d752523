"""An inspection on a terminal: tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merger.charts.drawing import number_text
from merger.inspection.presentation import present, readings
from merger.inspection.report import Inspection, View
from merger.inspection.statistic import Unit
from merger.inspection.tables import (
    Column,
    Table,
    curve_table,
    expert_table,
    layer_table,
    pair_table,
    series_tables,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BAR = 4
"""Characters of a heat bar."""
ROWS = 12
"""Rows of a table by layer or projection, unless all are asked for."""
WIDTH = 80


def print_inspection(inspection: Inspection, console: Console, *, all_rows: bool = False) -> None:
    """The whole model first, then layers and projections; ``all_rows`` shows all of those."""
    if inspection.made is not None:
        _print_summary(inspection, console)
    for block in _tables_of_whole(inspection):
        if isinstance(block, str):
            console.print(block, markup=False)
            continue
        for part in _split(block):
            console.print(_drawn(part))
    for table in _tables_by_layer(inspection):
        rows = table.rows if all_rows else table.rows[:ROWS]
        console.print(_drawn(next(_split(replace(table, rows=rows)))))
        if len(rows) < len(table.rows):
            console.print(f"... and {len(table.rows) - len(rows)} more; --all shows them", markup=False)
    copied = len(inspection.copied)
    if copied:
        console.print(f"{copied} {'tensor is' if copied == 1 else 'tensors are'} copied, and not counted", markup=False)


def _tables_of_whole(inspection: Inspection) -> Iterator[Table | str]:
    """The tables of the whole model, and sentences after those that they are about."""
    experts = [view for view in inspection.views if view.about == "experts"]
    for view in experts:
        table = expert_table(view, inspection.experts)
        yield replace(table, heading=f"expert ({view.name})")
        yield from readings(view)
    for view in (*experts[:1], *(view for view in inspection.merging() if view is not experts[0])):
        pairs = pair_table(view, inspection.experts)
        yield from [] if pairs is None else [pairs]
        yield from series_tables(view) if len(inspection.experts) > 1 else ()
    if inspection.curves is not None:
        yield curve_table(inspection.curves.whole)
    for view in inspection.views:
        if view.name == "result":
            yield replace(expert_table(view, inspection.experts), heading="result")


def _tables_by_layer(inspection: Inspection) -> Iterator[Table]:
    results = [view for view in inspection.views if view.name == "result"]
    views = results if inspection.subject == "merge" else inspection.merging()
    requested = [view for view in inspection.views if _has_requested(view) and view not in views]
    for view in (*requested, *views):
        yield layer_table(view, "layer", view.layers)
        yield layer_table(view, "projection", view.projections)


def _has_requested(view: View) -> bool:
    """Whether a view has statistics that the user asked for."""
    return any(entry.request is not None and entry.in_layers for entry in present(view))


def _print_summary(inspection: Inspection, console: Console) -> None:
    """The facts of a finished merge's manifest."""
    summary = inspection.made or {}
    method = summary.get("method") or "+".join(name for stage in summary.get("pipeline", ()) for name in stage)
    counts = ", ".join(f"{count} {action}" for action, count in summary["tensors"].items())
    console.print(f"{method} by merger {summary['versions']['merger']}, seed {summary['seed']}: {counts}", markup=False)
    for label, source in summary["inputs"].items():
        console.print(f"  {label}: {source}", markup=False, soft_wrap=True)


# --- tables ---------------------------------------------------------------------------------------


def _split(table: Table) -> Iterator[Table]:
    """The table in parts that fit the width, each with the names of the rows that have numbers there."""
    names = max(map(len, (*table.rows, *table.heading.split("\n"))), default=0) + 3
    columns: list[Column] = []
    for column in table.columns:
        if columns and names + sum(map(_width, (*columns, column))) > WIDTH:
            yield _with_columns(table, columns)
            columns = []
        columns.append(column)
    yield _with_columns(table, columns)


def _with_columns(table: Table, columns: Sequence[Column]) -> Table:
    rows = [row for row in table.rows if any(row in column.numbers for column in columns)]
    return replace(table, rows=rows, columns=columns)


def _width(column: Column) -> int:
    """The characters that a column takes, its distance from the next included."""
    numbers = [len(_number(number, column.unit)) for number in column.numbers.values()]
    bar = BAR + 1 if column.unit == "share" else 0
    return max(max(numbers, default=0) + bar, *map(len, _stacked(column.heading).split("\n"))) + 2


def _stacked(heading: str) -> str:
    """A heading of several words in two lines."""
    return heading if "\n" in heading else heading.replace(" ", "\n", 1)


def _drawn(table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate([table.heading, *(_stacked(column.heading) for column in table.columns)]):
        drawn.add_column(heading, overflow="fold", no_wrap=i > 0)
    for row in table.rows:
        cells = [_cell(column, column.numbers.get(row)) for column in table.columns]
        drawn.add_row(Text(row), *cells)  # a name may look like markup and is plain text
    return drawn


def _cell(column: Column, number: float | None) -> Text:
    """A number; of a share with a bar."""
    from rich.text import Text

    if number is None:
        return Text("")
    if column.unit != "share":
        return Text(_number(number, column.unit))
    eighths = round(max(0.0, min(1.0, number / (column.full or 1))) * BAR * 8)
    blocks, remainder = divmod(eighths, 8)
    bar = "█" * blocks + ("▏▎▍▌▋▊▉"[remainder - 1] if remainder else "")
    return Text.assemble(_number(number, column.unit), " ", (bar.ljust(BAR), "cyan"))


def _number(number: float, unit: Unit) -> str:
    return f"{number:+.3f}" if unit == "cosine" else number_text(number)
