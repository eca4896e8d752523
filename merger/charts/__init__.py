"""Charts as data, and the one place that draws them: as SVG for pages and files, by matplotlib where pixels are needed.

Knows no models and no statistics.
"""

from merger.charts.bars import Bar, BarChart
from merger.charts.drawing import Chart, Drawing, in_row
from merger.charts.heat import CellMap, Heatmap
from merger.charts.lines import LineChart, Series

__all__ = ["Bar", "BarChart", "CellMap", "Chart", "Drawing", "Heatmap", "LineChart", "Series", "in_row"]
