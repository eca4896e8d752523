"""Words and small tables for people, which notebooks, terminals and `repr` share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merger.display.page import html_table as table_element
from merger.display.table import Column, Table, text_row


def size_text(count: int) -> str:
    """1.23 GB: three digits, as disks are sold."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.3g} {unit}" if unit != "B" else f"{count} B"


def name_list(names: Sequence[str]) -> str:
    """The names, or the first five and how many more there are."""
    shown, rest = names[:5], len(names) - 5
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table for `_repr_html_`; all texts are escaped."""
    table = Table([Column(heading) for heading in columns], [text_row(*row) for row in rows], caption)
    return table_element(table)
