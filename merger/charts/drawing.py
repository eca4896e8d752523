"""A drawing: lines, areas, texts and cells at their places, which `svg` and `files` write in their formats.

Coordinates are pixels, from the top left corner; a text is 12 high unless it says otherwise.
"""

from __future__ import annotations

import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from merger.charts.paint import HEAT, series_paint

Point = tuple[float, float]
TEXT = 12.0
"""Height of texts."""
MARKS: tuple[tuple[Sequence[Point], bool], ...] = (
    (tuple((4 * math.cos(i * math.pi / 6), 4 * math.sin(i * math.pi / 6)) for i in range(12)), True),
    (((-3, -3), (3, -3), (3, 3), (-3, 3)), True),
    (((0, -4), (4, 3), (-4, 3)), True),
    (((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)), True),
    (((-3, -3), (3, 3), (0, 0), (3, -3), (-3, 3)), False),
    (((0, -4), (0, 4), (0, 0), (-4, 0), (4, 0)), False),
)
"""A disc, a square, a triangle, a diamond, a cross and a plus: with them no series is known by its colour alone."""


@dataclass(frozen=True)
class Path:
    """A line through points, or an area where it has a fill."""

    points: Sequence[Point]
    stroke: str = ""  # the role of a colour in `paint`, or none
    fill: str = ""
    width: float = 1.5
    dashes: Sequence[float] = ()

    def moved(self, x: float, y: float) -> Path:
        """The same elsewhere."""
        return replace(self, points=[(a + x, b + y) for a, b in self.points])


@dataclass(frozen=True)
class Text:
    """One line of text; x, y is where its baseline starts, has its middle, or ends."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    size: float = TEXT
    paint: str = "ink"
    upright: bool = False  # reads from bottom to top

    def moved(self, x: float, y: float) -> Text:
        """The same elsewhere."""
        return replace(self, x=self.x + x, y=self.y + y)


@dataclass(frozen=True)
class Cells:
    """A rectangle of equal cells, each with a heat in [0, 1]; None leaves a cell out."""

    x: float
    y: float
    width: float
    height: float
    heats: Sequence[Sequence[float | None]]  # top row first
    paint: str = HEAT  # the role of the colour of the strongest heat

    def moved(self, x: float, y: float) -> Cells:
        """The same elsewhere."""
        return replace(self, x=self.x + x, y=self.y + y)


Shape = Path | Text | Cells


@dataclass(frozen=True)
class Drawing:
    """Shapes on a rectangle."""

    width: float
    height: float
    shapes: Sequence[Shape]


@dataclass(frozen=True)
class Chart(ABC):
    """A chart as data."""

    title: str
    caption: str

    @abstractmethod
    def drawing(self) -> Drawing:
        """Draws the chart, without its title and caption."""

    @abstractmethod
    def summary(self) -> str:
        """The figures in a few words, for readers who do not see the chart."""

    def description(self) -> str:
        """The title, the caption and the figures in words."""
        return f"{self.title}: {self.caption.rstrip('.')}. {self.summary()}"

    def titled(self) -> Drawing:
        """Draws the chart below its title and caption."""
        body = self.drawing()
        lines = textwrap.wrap(self.caption, max(24, int(body.width / text_width("n", 11))))
        width = max(body.width, text_width(self.title, 14))
        top = 20.0 + 15 * len(lines) + 8
        heading = [Text(0, 14, self.title, size=14)]
        heading += [Text(0, 32 + 15 * i, line, size=11, paint="faint") for i, line in enumerate(lines)]
        return Drawing(width, body.height + top, [*heading, *(shape.moved(0, top) for shape in body.shapes)])


def in_row(drawings: Sequence[Drawing], gap: float = 32, margin: float = 16) -> Drawing:
    """Drawings beside each other, with a margin around all."""
    shapes: list[Shape] = []
    x = margin
    for drawing in drawings:
        shapes += [shape.moved(x, margin) for shape in drawing.shapes]
        x += drawing.width + gap
    height = max(drawing.height for drawing in drawings)
    return Drawing(x - gap + margin, height + 2 * margin, shapes)


# --- parts that several charts have ---------------------------------------------------------------


def rectangle(x: float, y: float, width: float, height: float, fill: str) -> Path:
    """A filled rectangle."""
    return Path([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], fill=fill)


def mark(number: int, x: float, y: float) -> Path:
    """The mark of a series, in its colour."""
    points, is_area = MARKS[number % len(MARKS)]
    outline = [*points, points[0]] if is_area else points
    return Path(outline, series_paint(number), "paper" if is_area else "", 1.6).moved(x, y)


def legend(names: Iterable[tuple[int, str]], x: float, y: float, width: float) -> tuple[list[Shape], float]:
    """The marks of series with their names, in lines of at most a width; and the height that they take."""
    shapes: list[Shape] = []
    column, line = x, y
    for number, name in names:
        space = 40 + text_width(name) + 16
        if column > x and column + space > x + width:
            column, line = x, line + 20
        shapes.append(Path([(column, line + 8), (column + 32, line + 8)], series_paint(number), width=1.8))
        shapes += [mark(number, column + 16, line + 8), Text(column + 40, line + 12, name)]
        column += space
    return shapes, line + 20 - y


def heat_scale(low: float, high: float, x: float, y: float, paint: str = HEAT) -> tuple[list[Shape], float]:
    """A bar from the least to the greatest heat with their numbers, and the width that it takes."""
    start = x + text_width(number_text(low)) + 8
    heats = [[i / 31 for i in range(32)]]
    shapes: list[Shape] = [
        Text(x, y + 10, number_text(low)),
        Cells(start, y, 160, 11, heats, paint),
        Text(start + 168, y + 10, number_text(high)),
    ]
    return shapes, start + 176 + text_width(number_text(high)) - x


def text_width(text: str, size: float = TEXT) -> float:
    """About as wide as a text is in a sans-serif font."""
    return 0.62 * size * len(text)


def number_text(value: float) -> str:
    """Three digits behind the point, as long as there are few before it; a whole number is whole."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


@dataclass(frozen=True)
class Scale:
    """A linear scale with ticks at round numbers."""

    start: float
    step: float
    steps: int

    @classmethod
    def around(cls, low: float, high: float) -> Scale:
        """The scale with about five steps that holds two numbers."""
        spread = high - low or abs(high) or 1.0
        power = 10.0 ** math.floor(math.log10(spread / 5))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= spread / 5 * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(first * step, step, max(1, last - first))

    def share(self, value: float) -> float:
        """Where a value lies, from 0 at the scale's start to 1 at its end."""
        return (value - self.start) / (self.step * self.steps)

    def ticks(self) -> list[tuple[float, str]]:
        """Each tick's place and its number."""
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return [(i / self.steps, f"{self.start + i * self.step:.{digits}f}") for i in range(self.steps + 1)]
