"""Heatmaps with numbers, and maps of many cells without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merger.charts.drawing import Cells, Chart, Drawing, Shape, Text, heat_scale, number_text, text_width
from merger.charts.paint import HEAT, ink_on

CELL_WIDTH, CELL_HEIGHT, NUMBER = 46.0, 20.0, 11.0
"""The size of a heatmap's cells, and the height of the numbers in them."""
HEADING = 20.0
"""The height of column headings that are written across."""
MAP = 240.0
"""The width and the height of a map."""


@dataclass(frozen=True)
class Heatmap(Chart):
    """Numbers by row and column, on a ground as strong as the number, from 0 or a negative least number on."""

    columns: Sequence[str]
    rows: Mapping[str, Mapping[str, float | None]]
    paint: str = HEAT  # of the strongest heat

    @property
    def span(self) -> tuple[float, float]:
        """The numbers of the weakest and the strongest heat; one is 0 unless there are numbers on both its sides."""
        values = [value for row in self.rows.values() for value in row.values() if value is not None]
        return min([0.0, *values]), max([0.0, *values])

    def summary(self) -> str:
        """The least and the greatest number, with their places."""
        cells = [
            (value, f"{name}, {column}" if len(self.columns) > 1 else name)
            for name, row in self.rows.items()
            for column, value in row.items()
            if value is not None
        ]
        if not cells:
            return "No numbers."
        (low, first), (high, last) = min(cells), max(cells)
        return f"From {number_text(low)} ({first}) to {number_text(high)} ({last})."

    def drawing(self) -> Drawing:
        """Draws the cells, the headings of columns and rows, and the scale."""
        widest = max(map(text_width, self.columns))
        level = widest + 8 <= 2 * CELL_WIDTH  # headings that are short enough are written across
        width = max(CELL_WIDTH, widest + 8) if level else CELL_WIDTH
        margin, top = max(map(text_width, self.rows)) + 8, (HEADING if level else widest + 10)
        low, high = self.span
        heats = [[_heat(row.get(name), low, high) for name in self.columns] for row in self.rows.values()]
        bottom = top + CELL_HEIGHT * len(self.rows)
        shapes: list[Shape] = [Cells(margin, top, width * len(self.columns), bottom - top, heats, self.paint)]
        for j, name in enumerate(self.columns):
            middle = margin + width * (j + 0.5)
            across = Text(middle, top - 6, name, "middle")
            shapes.append(across if level else replace(across, x=middle + 4, anchor="start", upright=True))
        middles = [margin + width * (j + 0.5) for j in range(len(self.columns))]
        baselines = [top + CELL_HEIGHT * i + 14 for i in range(len(self.rows))]
        shapes += [Text(margin - 8, y, name, "end") for y, name in zip(baselines, self.rows, strict=True)]
        numbers = [
            Text(x, y, number_text(value), "middle", NUMBER, ink_on(heat, self.paint))
            for y, row, line in zip(baselines, self.rows.values(), heats, strict=True)
            for x, value, heat in zip(middles, map(row.get, self.columns), line, strict=True)
            if value is not None and heat is not None
        ]
        numbers.sort(key=lambda text: text.paint)  # neighbours of one colour make a smaller file
        shapes += numbers
        key, key_width = heat_scale(low, high, margin, bottom + 10, self.paint)
        return Drawing(margin + max(width * len(self.columns), key_width), bottom + 26, [*shapes, *key])


@dataclass(frozen=True)
class CellMap(Chart):
    """One value in each of many equal cells."""

    values: Sequence[Sequence[float]]  # top row first
    span: tuple[float, float]  # the numbers of the weakest and the strongest heat
    x_label: str = "columns"
    y_label: str = "rows"
    paint: str = HEAT  # of the strongest heat

    def summary(self) -> str:
        """The least and the greatest value."""
        values = [value for row in self.values for value in row]
        return f"From {number_text(min(values))} to {number_text(max(values))}."

    def drawing(self) -> Drawing:
        """Draws the cells, the labels of both sides and the scale."""
        heats = [[_heat(value, *self.span) for value in row] for row in self.values]
        key, key_width = heat_scale(*self.span, 16, MAP + 28, self.paint)
        labels = [
            Text(16 + MAP / 2, MAP + 16, self.x_label, "middle"),
            Text(12, MAP / 2, self.y_label, "middle", upright=True),
        ]
        return Drawing(
            max(16 + MAP, 16 + key_width), MAP + 44, [Cells(16, 0, MAP, MAP, heats, self.paint), *labels, *key]
        )


def _heat(value: float | None, low: float, high: float) -> float | None:
    if value is None:
        return None
    return (value - low) / (high - low) if high > low else 0.0
