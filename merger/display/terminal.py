"""Tables and sentences on a terminal, whose lines are no longer than it is wide; no word or number is broken."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merger.display.table import Cell, Table, unbroken

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BAR = 4
"""Characters of a bar."""
WIDE, NARROW = 3, 2
"""Spaces between columns, where there is room and where there is not."""
PROSE = 26
"""The least width of a column of prose."""
NO_BREAK = "\0"
"""Stands for a space at which no line ends."""


def print_text(text: str, console: Console, *, command: str = "") -> None:
    """Prints a sentence; a terminal breaks it between words, other outputs get one line.

    A word longer than the line, such as a path, is left to the terminal, so that it can be copied; and so is the
    ``command`` that ends the sentence, which begins a line of its own where it would be broken.
    """
    lines = _lines(text, console.width) if console.is_terminal else [text]
    if command and (not console.is_terminal or len(f"{lines[-1]} {command}") <= console.width):
        lines[-1] += f" {command}"
    elif command:
        lines.append(f"  {command}")
    for line in lines:
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _lines(text: str, width: int) -> list[str]:
    """The text broken between words, but not within a figure; what is indented stays so."""
    indent = " " * (len(text) - len(text.lstrip()))
    glued = unbroken(text, NO_BREAK)
    lines = textwrap.wrap(
        glued, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, expand_tabs=False
    )
    return [line.replace(NO_BREAK, " ") for line in lines] or [""]


def print_table(table: Table, console: Console) -> None:
    """Prints a table; where it is too wide, in parts below each other, each with the names of its rows."""
    for part, gap in _parts(table, console.width):
        console.print(_drawn(part, gap, fits(part, console.width, gap)))


def print_columns(table: Table, console: Console) -> list[str]:
    """Prints as many columns as fit, and returns the headings of those that are left out."""
    part, gap = next(_parts(table, console.width))
    console.print(_drawn(part, gap, fits(part, console.width, gap)))
    return [" ".join(column.heading.split()) for column in table.columns[len(part.columns) :]]


# --- the parts that fit -----------------------------------------------------------------------------


def _parts(table: Table, width: int) -> Iterator[tuple[Table, int]]:
    """The table in parts that fit the width, with the spaces between their columns."""
    if fits(table, width):
        yield table, WIDE
        return
    table = _with_short_names(_with_stacked_headings(table), width)
    names, *figures = _widths(table)
    part: list[int] = []
    used = 1 + names
    for number, figure in enumerate(figures, 1):
        if part and used + NARROW + figure > width:
            yield _with_columns(table, part), NARROW
            part, used = [], 1 + names
        part.append(number)
        used += NARROW + figure
    yield _with_columns(table, part), NARROW


def fits(table: Table, width: int, gap: int = WIDE) -> bool:
    """Whether a table fits a width as it is."""
    widths = _widths(table)
    return 1 + sum(widths) + gap * (len(widths) - 1) <= width


def _widths(table: Table) -> list[int]:
    """The least width of each column."""
    return [_column_width(table, number) for number in range(len(table.columns))]


def _column_width(table: Table, number: int) -> int:
    from rich.cells import cell_len

    column = table.columns[number]
    cells = [row.cells[number] for row in table.rows if number < len(row.cells)]
    bar = BAR + 1 if any(cell.bar is not None for cell in cells) else 0
    texts = max((cell_len(line) for cell in cells for line in cell.text.split("\n")), default=0) + bar
    heading = max(map(cell_len, column.heading.split("\n")))
    return max(heading, min(texts, PROSE) if column.is_prose else texts)


def _with_stacked_headings(table: Table) -> Table:
    """The table with headings of several words in two lines, the names' heading apart."""
    first, *columns = table.columns
    stacked = [replace(column, heading=_stacked(column.heading)) for column in columns]
    return replace(table, columns=[first, *stacked])


def _stacked(heading: str) -> str:
    return heading if "\n" in heading else heading.replace(" ", "\n", 1)


def _with_short_names(table: Table, width: int) -> Table:
    """The table with names that leave room for the widest other column, broken behind dots and slashes."""
    names, *figures = _widths(table)
    room = width - 1 - NARROW - max(figures, default=0)
    if names <= room or table.columns[0].is_prose:
        return table
    rows = [
        replace(row, cells=[Cell(broken(row.cells[0].text, room), row.cells[0].bar), *row.cells[1:]])
        for row in table.rows
    ]
    return replace(table, rows=rows)


def broken(name: str, width: int) -> str:
    """A name in lines of at most a width, broken behind ``.``, ``/`` or a space where it can be."""
    lines = [""]
    for piece in re.findall(r"[^./ ]*[./ ]|[^./ ]+", name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)


def _with_columns(table: Table, numbers: Sequence[int]) -> Table:
    """The names with some of the columns, and the rows that have cells there."""
    rows = []
    for row in table.rows:
        cells = [row.cells[number] for number in numbers if number < len(row.cells)]
        if any(cell.text for cell in cells) or len(row.cells) == 1:
            rows.append(replace(row, cells=[row.cells[0], *cells]))
    columns = [table.columns[0], *(table.columns[number] for number in numbers)]
    return replace(table, columns=columns, rows=rows)


# --- drawing ----------------------------------------------------------------------------------------


def _drawn(table: Table, gap: int, has_room: bool) -> Any:
    """The table as rich draws it; texts are plain, for a name may look like markup.

    Without room, which happens where a single word is wider than the terminal, rich breaks cells as it must.
    """
    from rich import box
    from rich.table import Table as RichTable

    padding = (0, 1, 0, gap - 2)
    title = table.title or None
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding, title=title, title_justify="left")
    for column in table.columns:
        no_wrap = has_room and not column.is_prose
        drawn.add_column(column.heading, justify=column.justify, overflow="fold", no_wrap=no_wrap)
    for row in table.rows:
        drawn.add_row(*map(_text, row.cells), style="bold" if row.is_bold else None, end_section=row.ends_section)
    return drawn


def _text(cell: Cell) -> Text:
    from rich.text import Text

    if cell.bar is None:
        return Text(cell.text)
    eighths = round(max(0.0, min(1.0, cell.bar)) * BAR * 8)
    blocks, remainder = divmod(eighths, 8)
    bar = "█" * blocks + ("▏▎▍▌▋▊▉"[remainder - 1] if remainder else "")
    return Text.assemble(cell.text, " ", (bar.ljust(BAR), "cyan"))
