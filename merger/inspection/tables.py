"""An inspection as tables for people, the worst first; they fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

from merger.inspection.conditions import numbers
from merger.inspection.report import Curve, Facts, Inspection, Merged, View

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BAR = 4
"""Characters of a heat bar."""

ROWS = 12
"""Rows of a table by layer or projection, unless all are asked for."""


def print_inspection(seen: Inspection, console: Console, *, every: bool = False) -> None:
    """The whole model first, then layers and projections; ``every`` shows all rows of those."""
    if seen.made is not None:
        _print_made(seen, console)
    experts = [view for view in seen.views if view.about == "experts"]
    for view in experts:
        _print_experts(view, console)
    if len(seen.experts) > 1:
        merging = [view for view in seen.merging() if view is not experts[0]]
        for view in (*experts[:1], *merging):
            _print_pairs(view, console)
    if seen.curves is not None:
        _print_curve(seen.curves.whole, console)
    results = [view for view in seen.views if view.name == "result"]
    for view in results:
        _print_result(view, console)
    by_what = results if seen.subject == "merge" else seen.merging()
    ranked = [view for view in experts if isinstance(view.whole, Facts) and view.whole.effective_rank]
    by_what = [*(view for view in ranked if view not in by_what), *by_what]
    for view in by_what:
        for title, groups in (("layer", view.layers), ("projection", view.projections)):
            _print_groups(view, title, groups, console, every)
    copied = len(seen.copied)
    if copied:
        console.print(f"{copied} {'tensor is' if copied == 1 else 'tensors are'} copied, and not counted", markup=False)


def _print_made(seen: Inspection, console: Console) -> None:
    """What the manifest says."""
    made = seen.made or {}
    how = made.get("method") or "+".join(name for stage in made.get("pipeline", ()) for name in stage)
    counts = ", ".join(f"{count} {what}" for what, count in made["tensors"].items())
    console.print(f"{how} by merger {made['versions']['merger']}, seed {made['seed']}: {counts}", markup=False)
    for label, source in made["inputs"].items():
        console.print(f"  {label}: {source}", markup=False, soft_wrap=True)


def _print_experts(view: View, console: Console) -> None:
    facts = view.whole
    assert isinstance(facts, Facts)
    columns: dict[str, Mapping[str, object]] = {
        "density": {name: _heat(value, 1) for name, value in facts.density.items()},
        "norm": facts.norm,
        "uneven\nrows": facts.uneven_rows,
        "uneven\ncolumns": facts.uneven_columns,
        "uneven\nblocks": facts.uneven_blocks,
        "distinct\nvalues": facts.distinct,
        **({} if facts.effective_rank is None else {"effective\nrank": facts.effective_rank}),
    }
    table = _table(f"expert ({view.name})", *columns)
    for name in facts.norm:
        values = (each[name] for each in columns.values())
        _row(table, name, *(number(value) if isinstance(value, float | int) else value for value in values))
    console.print(table)


def _print_pairs(view: View, console: Console) -> None:
    """Both ways of the overlap, the larger first."""
    facts = view.whole
    assert isinstance(facts, Facts)
    table = _table(f"A, B ({view.name})", "of A in B", "of B in A", "jaccard", "conflict", "cosine")
    pairs = [(a, b) if facts.overlap[a][b] >= facts.overlap[b][a] else (b, a) for a, b in combinations(facts.norm, 2)]
    for a, b in sorted(pairs, key=lambda pair: -facts.overlap[pair[0]][pair[1]]):
        _row(
            table,
            f"{a}, {b}",
            *(_heat(share, 1) for share in (facts.overlap[a][b], facts.overlap[b][a])),
            f"{facts.jaccard[a][b]:.3f}",
            _heat(facts.sign_conflict[a][b], 1),
            f"{facts.cosine[a][b]:+.3f}",
        )
    console.print(table)


def _print_curve(curve: Curve, console: Console) -> None:
    """The pair that overlaps most and the most uneven expert, beside random masks."""
    uneven = max(curve.uneven_rows, key=lambda name: sum(curve.uneven_rows[name]))
    columns = [("uneven rows", uneven, curve.uneven_rows[uneven]), ("", "at random", curve.uneven_rows_random[uneven])]
    pairs = combinations(curve.uneven_rows, 2)
    worst = max(pairs, key=lambda pair: sum(curve.overlap[pair[0]][pair[1]]), default=None)
    if worst is not None:
        a, b = worst
        overlap = ("overlap", f"{a}, {b}", curve.overlap[a][b]), ("", "at random", curve.overlap_random[a][b])
        columns = [*overlap, *columns]
    table = _table("largest by\nmagnitude", *(f"{what}\n{who}" for what, who, _ in columns))
    for density, *values in zip(curve.densities, *(values for _, _, values in columns), strict=True):
        _row(table, f"{density:.2f}", *(_heat(value, 1) for value in values))
    console.print(table)


def _print_result(view: View, console: Console) -> None:
    facts = view.whole
    assert isinstance(facts, Merged)
    table = _table(f"ends at ({view.name})", "share", "cosine with its task vector")
    _row(table, "base", _heat(facts.at_base, 1), "")
    for name, share in facts.at_expert.items():
        _row(table, name, _heat(share, 1), f"{facts.cosine[name]:+.3f}")
    _row(table, "a blend", _heat(facts.blend, 1), "")
    console.print(table)


def _print_groups(view: View, title: str, groups: Mapping[str, Facts | Merged], console: Console, every: bool) -> None:
    ranked = isinstance(view.whole, Facts) and view.whole.effective_rank is not None
    columns = {name: _columns(facts, ranked=ranked) for name, facts in groups.items()}
    headings = list(next(iter(columns.values())))
    most = {heading: max(each[heading] for each in columns.values()) for heading in headings}
    table = _table(f"{title} ({view.name})", *headings)
    worst = sorted(columns, key=lambda name: -columns[name][headings[0]])
    short = shortened(worst)
    for name in worst if every else worst[:ROWS]:
        heats = [_heat(columns[name][heading], most[heading]) for heading in headings[:3]]
        _row(table, short[name], *heats, *(number(columns[name][heading]) for heading in headings[3:]))
    console.print(table)
    if not every and len(worst) > ROWS:
        console.print(f"... and {len(worst) - ROWS} more; --all shows them", markup=False)


def shortened(names: Iterable[str]) -> dict[str, str]:
    """Names without the first part that all of them share, and without .weight."""
    short = {name: name.removesuffix(".weight") for name in names}
    firsts = {each.partition(".")[0] if "." in each else "" for each in short.values()}
    prefix = f"{firsts.pop()}." if len(firsts) == 1 else ""
    return {name: each.removeprefix(prefix) for name, each in short.items()}


def _columns(facts: Facts | Merged, *, ranked: bool) -> dict[str, float]:
    """What a table by layer shows: what it is sorted by comes first, and the first three have bars."""
    if isinstance(facts, Merged):
        return {"blend": facts.blend, "base": facts.at_base, **facts.at_expert}
    density, norm, uneven = (most(each) for each in (facts.density, facts.norm, facts.uneven_rows))
    rank = {"rank": most(facts.effective_rank)} if ranked else {}
    if len(facts.norm) == 1:
        return {"norm": norm, "density": density, "uneven rows": uneven, "distinct": most(facts.distinct), **rank}
    overlap, conflict = most(facts.overlap), most(facts.sign_conflict)
    columns = {"overlap": overlap, "conflict": conflict, "density": density, "norm": norm}
    return {**columns, **(rank or {"uneven": uneven})}


def most(value: Any) -> float:
    """The largest number of a fact; 0 of one that nobody asked for, or that has no experts or pairs."""
    return max((number for _, number in numbers(value)), default=0.0)


# --- tables ---------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits behind the point, as long as there are few before it; a whole number is whole."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if value < 10 else f"{value:.4g}"


def _heat(value: float, most: float) -> Text:
    """A number and a bar as long as its share of the most there is."""
    from rich.text import Text

    eighths = round(max(0.0, min(1.0, value / most if most else 0)) * BAR * 8)
    full, rest = divmod(eighths, 8)
    bar = "█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")
    return Text.assemble(number(value), " ", (bar.ljust(BAR), "cyan"))


def _table(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=i > 0)
    return table


def _row(table: Any, *cells: object) -> None:
    """Adds a row; a name may look like markup and is plain text."""
    from rich.text import Text

    table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))
