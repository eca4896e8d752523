"""Charts of lines and points over a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from merger.charts.drawing import Chart, Drawing, Path, Point, Scale, Shape, Text, legend, mark, number_text, text_width
from merger.charts.paint import series_paint

WIDTH, HEIGHT = 440.0, 300.0
"""The area of a chart between its axes."""


@dataclass(frozen=True)
class Series:
    """One line: with marks at its points, dashed as a reference, as dots alone, or in steps."""

    name: str  # in the legend; "" keeps a line out of it
    points: Sequence[Point]
    number: int  # of its colour and mark
    style: Literal["marks", "dashed", "dots", "steps"] = "marks"


@dataclass(frozen=True)
class LineChart(Chart):
    """Lines over a number."""

    x_label: str
    series: Sequence[Series]
    y_label: str = ""
    from_zero: bool = True  # whether the scale of y starts at 0
    top: float | None = None  # where the scale of y ends, by default at the greatest value
    diagonal: bool = False  # whether x = y is drawn

    def summary(self) -> str:
        """The ends of every line that the legend names."""
        lines = [
            f"{series.name or self.title} from {_place(series.points[0])} to {_place(series.points[-1])}"
            for series in self.series
            if series.points and (series.name or len(self.series) == 1)
        ]
        return f"{'; '.join(lines)}."

    def drawing(self) -> Drawing:
        """Draws axes, lines and legend."""
        x_scale, y_scale = self._scales()
        margin = 14 + max(text_width(text) for _, text in y_scale.ticks())

        def place(point: Point) -> Point:
            return margin + x_scale.share(point[0]) * WIDTH, 10 + (1 - y_scale.share(point[1])) * HEIGHT

        shapes: list[Shape] = _axes(x_scale, y_scale, margin)
        shapes.append(Text(margin + WIDTH / 2, HEIGHT + 46, self.x_label, "middle"))
        if self.y_label:
            shapes.append(Text(margin, 0, self.y_label, paint="faint"))
        if self.diagonal:
            shapes.append(Path([place((0, 0)), place((1, 1))], "faint", dashes=(2, 4), width=1))
        for series in self.series:
            shapes += _series(series, [place(point) for point in series.points])
        names = [(series.number, series.name) for series in self.series if series.name]
        key, height = legend(names, margin, HEIGHT + 58, WIDTH)
        return Drawing(margin + WIDTH + 16, HEIGHT + 58 + height, [*shapes, *key])

    def _scales(self) -> tuple[Scale, Scale]:
        points = [point for series in self.series for point in series.points]
        across, up = [x for x, _ in points], [y for _, y in points]
        top = max(up) if self.top is None else self.top
        return Scale.around(min(0, *across), max(across)), Scale.around(0 if self.from_zero else min(up), top)


def _place(point: Point) -> str:
    return f"{number_text(point[1])} at {number_text(point[0])}"


def _axes(x_scale: Scale, y_scale: Scale, margin: float) -> list[Shape]:
    """A grid of lines at the ticks of y, and the numbers of both scales."""
    shapes: list[Shape] = []
    for share, text in y_scale.ticks():
        y = 10 + HEIGHT * (1 - share)
        shapes += [Path([(margin, y), (margin + WIDTH, y)], "rule", width=1), Text(margin - 6, y + 4, text, "end")]
    shapes += [Text(margin + WIDTH * share, HEIGHT + 28, text, "middle") for share, text in x_scale.ticks()]
    return shapes


def _series(series: Series, places: Sequence[Point]) -> list[Shape]:
    paint = series_paint(series.number)
    if series.style == "dashed":
        return [Path(places, paint, width=1.4, dashes=(7, 5))]
    marks = [mark(series.number, *place) for place in places]
    if series.style == "dots":
        return list(marks)
    if series.style == "steps":
        corners = [(x, y) for (_, y), (x, _) in pairwise(places)]
        steps = [point for pair in zip(places, [*corners, places[-1]], strict=True) for point in pair]
        return [Path(steps, paint, width=1.8)]
    return [Path(places, paint, width=1.8), *marks]
