"""A table as data, which terminals, pages and notebooks show alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """The heading of a column, and how its cells are set."""

    heading: str = ""  # a newline in it stays
    justify: Literal["left", "right"] = "left"
    explanation: str = ""  # a sentence on the column's figures
    is_prose: bool = False  # whether its cells may break between words


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and the share of its bar that is filled."""

    text: str = ""
    bar: float | None = None


@dataclass(frozen=True)
class Row:
    """The cells of a row; a row of a single cell is a heading for the rows below it."""

    cells: Sequence[Cell]
    is_bold: bool = False
    ends_section: bool = False
    swatch: str = ""  # the role of a colour in `merger.charts.paint` that marks the row, or none


@dataclass(frozen=True)
class Table:
    """Rows with a name in the first column."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""


_TOGETHER = re.compile(r"(?<=\d) (?=(?:%|s|[kMGT]?B)(?!\w))|\[[-\d., ]+\]")


def unbroken(text: str, space: str) -> str:
    """The text with ``space`` where no line may end: between a number and its unit, and in an interval."""
    return _TOGETHER.sub(lambda match: match[0].replace(" ", space), text)


def text_row(*texts: object, is_bold: bool = False, ends_section: bool = False) -> Row:
    """A row of plain texts."""
    return Row([Cell(str(text)) for text in texts], is_bold, ends_section)
