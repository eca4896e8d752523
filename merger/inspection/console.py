"""An inspection on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from merger.display.terminal import print_columns, print_table, print_text
from merger.inspection.findings import findings
from merger.inspection.presentation import present, readings
from merger.inspection.report import Inspection, View
from merger.inspection.tables import (
    Table,
    curve_table,
    display_table,
    expert_table,
    layer_table,
    pair_table,
    series_tables,
)

if TYPE_CHECKING:
    from rich.console import Console

ROWS = 12
"""Rows of a table by layer or projection, unless all are asked for."""


def print_inspection(inspection: Inspection, console: Console, *, all_rows: bool = False) -> None:
    """Prints the whole model, then layers and projections, and what the figures say.

    Of a long table by layer the first rows are printed, or all of them with ``all_rows``.
    """
    if inspection.made is not None:
        _print_summary(inspection, console)
    for block in _tables_of_whole(inspection):
        if isinstance(block, str):
            print_text(block, console)
        else:
            print_table(display_table(block), console)
    for table in _tables_by_layer(inspection):
        rows = table.rows if all_rows else table.rows[:ROWS]
        absent = print_columns(display_table(replace(table, rows=rows)), console)
        if absent:
            print_text(f"without {', '.join(absent)}, which a wider window or --json has", console)
        if len(rows) < len(table.rows):
            print_text(f"... and {len(table.rows) - len(rows)} more; --all shows them", console)
    copied = len(inspection.copied)
    if copied:
        print_text(f"{copied} {'tensor is' if copied == 1 else 'tensors are'} copied, and not counted", console)
    for sentence in findings(inspection):
        print_text(sentence, console)


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
    print_text(f"{method} by merger {summary['versions']['merger']}, seed {summary['seed']}: {counts}", console)
    for label, source in summary["inputs"].items():
        print_text(f"  {label}: {source}", console)
