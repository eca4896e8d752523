"""Charts of horizontal bars with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from merger.charts.drawing import Chart, Drawing, Path, Scale, Shape, Text, legend, number_text, rectangle, text_width
from merger.charts.paint import series_paint

WIDTH, BAR, GAP = 440.0, 14.0, 12.0
"""The width between the ends of the scale, the height of a bar, and the space between rows of bars."""


@dataclass(frozen=True)
class Bar:
    """A value and the interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BarChart(Chart):
    """Rows of bars, one of each series; None leaves a bar out."""

    x_label: str
    rows: Sequence[str]
    series: Mapping[str, Sequence[Bar | None]]  # in the order of the rows
    numbers: Sequence[int] = ()  # of the colours of the series; in their order, if empty

    def summary(self) -> str:
        """Every bar's value by row."""
        rows = []
        for i, row in enumerate(self.rows):
            bars = {name: series[i] for name, series in self.series.items()}
            values = ", ".join(f"{name} {number_text(bar.value)}" for name, bar in bars.items() if bar is not None)
            rows.append(f"{row}: {values}")
        return f"{'; '.join(rows)}."

    def drawing(self) -> Drawing:
        """Draws the bars with their rows' names, the scale and the legend."""
        numbers = self.numbers or range(len(self.series))
        bars = [bar for series in self.series.values() for bar in series if bar is not None]
        scale = Scale.around(min([0.0, *(bar.low for bar in bars)]), max([0.0, *(bar.high for bar in bars)]))
        margin = 12 + max((text_width(name) for name in self.rows), default=0)
        row_height = BAR * len(self.series) + GAP
        bottom = row_height * len(self.rows)

        def place(value: float) -> float:
            return margin + scale.share(value) * WIDTH

        shapes: list[Shape] = []
        for share, text in scale.ticks():
            x = margin + share * WIDTH
            shapes += [Path([(x, 0), (x, bottom)], "rule", width=1), Text(x, bottom + 16, text, "middle")]
        shapes.append(Text(margin + WIDTH / 2, bottom + 36, self.x_label, "middle"))
        for i, name in enumerate(self.rows):
            top = i * row_height + GAP / 2
            shapes.append(Text(margin - 8, top + (row_height - GAP) / 2 + 4, name, "end"))
            for line, (number, series) in enumerate(zip(numbers, self.series.values(), strict=True)):
                shapes += _bar(series[i], number, top + line * BAR, place(0), place)
        key, height = legend(zip(numbers, self.series, strict=True), margin, bottom + 48, WIDTH)
        return Drawing(margin + WIDTH + 16, bottom + 48 + height, [*shapes, *key])


def _bar(bar: Bar | None, number: int, top: float, zero: float, place: Callable[[float], float]) -> list[Shape]:
    if bar is None:
        return []
    end, middle = place(bar.value), top + BAR / 2
    interval = [(place(bar.low), middle), (place(bar.high), middle)]
    return [
        rectangle(min(zero, end), top + 1, abs(end - zero), BAR - 2, series_paint(number)),
        Path(interval, "ink", width=1.4),
    ]
