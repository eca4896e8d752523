"""Charts are drawn once: as SVG, and by matplotlib from the same drawing."""

import xml.etree.ElementTree
from dataclasses import replace

import numpy
import pytest

from merger.charts import Bar, BarChart, CellMap, Heatmap, LineChart, Series, files, in_row
from merger.charts.drawing import Cells, Path, Scale, Text
from merger.charts.paint import DARK, LIGHT, SERIES, ink_on, series_paint, strength
from merger.charts.svg import adaptive, standalone, themed
from merger.errors import RecipeError
from merger.evaluation.plots import check_plot, trials_chart

LINES = LineChart("loss", "by trial", "trial", [Series("a", [(0, 1), (1, 3), (2, 2)], 0)])
BARS = BarChart("kept", "", "share", ["x", "y"], {"a": [Bar(0.5, 0.4, 0.7), None], "b": [Bar(-0.2, -0.3, 0.1)] * 2})
HEAT = Heatmap("overlap", "of pairs", ["a", "b"], {"a": {"b": 0.25}, "b": {"a": 0.75, "b": None}})
MAP = CellMap("density", "of cells", [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]], (0.0, 1.0))
CHARTS = [LINES, BARS, HEAT, MAP]


def texts(drawing):
    return [shape.text for shape in drawing.shapes if isinstance(shape, Text)]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 3, ["0", "1", "2", "3"]),
        (0, 0.83, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-2.1, -1.9, ["-2.10", "-2.05", "-2.00", "-1.95", "-1.90"]),
        (0, 4200, ["0", "1000", "2000", "3000", "4000", "5000"]),
        (5, 5, ["5", "6"]),
    ],
)
def test_a_scale_has_round_numbers_around_its_values(low, high, ticks):
    assert [text for _, text in Scale.around(low, high).ticks()] == ticks


def test_a_line_goes_through_its_points():
    (line,) = [shape for shape in LINES.drawing().shapes if isinstance(shape, Path) and len(shape.points) == 3]
    (x0, y0), (x1, y1), (x2, y2) = line.points
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(2)  # 1 to 3 against 1 to 2; up is less


def test_a_bar_ends_at_its_value_and_its_interval_around_it():
    areas = [shape for shape in BARS.drawing().shapes if isinstance(shape, Path) and shape.fill.startswith("series")]
    intervals = [shape for shape in BARS.drawing().shapes if isinstance(shape, Path) and shape.stroke == "ink"]
    assert (len(areas), len(intervals)) == (3, 3)
    zero, end = areas[0].points[0][0], areas[0].points[1][0]
    (low, _), (high, _) = intervals[0].points
    assert (high - low) / (end - zero) == pytest.approx(0.3 / 0.5)
    assert low < end < high


def test_a_heatmap_has_its_numbers_and_leaves_out_what_has_none():
    drawing = HEAT.drawing()
    assert texts(drawing).count("0.750") == 2  # in its cell and on the scale
    cells = next(shape for shape in drawing.shapes if isinstance(shape, Cells))
    assert cells.heats == [[None, pytest.approx(1 / 3)], [1.0, None]]


@pytest.mark.parametrize(
    ("numbers", "span"), [((0.4, 0.5), (0, 0.5)), ((-0.2, 0.5), (-0.2, 0.5)), ((-0.2, -0.1), (-0.2, 0)), ((), (0, 0))]
)
def test_the_scale_of_a_heatmap_holds_0(numbers, span):
    assert Heatmap("", "", ["a"], {f"{number}": {"a": number} for number in numbers}).span == span


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_numbers_on_a_heat_in_the_colour_of_an_expert_are_legible(palette):
    for number in range(SERIES):
        paint = series_paint(number)
        for heat in (0.0, 0.5, 1.0):
            ground = mixed(palette["low"], palette[paint], strength(heat, paint))
            assert contrast(ground, linear(palette[ink_on(heat, paint)])) >= 4.5, (paint, heat)


TO_CONES = numpy.array([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]])
"""From linear light to the responses whose cube roots oklab mixes (https://bottosson.github.io/posts/oklab)."""


def linear(colour):
    """Red, green and blue light of #rrggbb."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return numpy.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares])


def mixed(low, high, share):
    """The light of `color-mix(in oklab, high share, low)`."""
    first, last = (numpy.cbrt(TO_CONES @ linear(colour)) for colour in (low, high))
    return numpy.linalg.solve(TO_CONES, (first + (last - first) * share) ** 3)


def contrast(ground, ink):
    """The contrast of WCAG 2 between two colours."""
    low, high = sorted(float(light @ [0.2126, 0.7152, 0.0722]) for light in (ground, ink))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("chart", "summary"),
    [
        (LINES, "a from 1 at 0 to 2 at 2."),
        (BARS, "x: a 0.500, b -0.200; y: b -0.200."),
        (HEAT, "From 0.250 (a, b) to 0.750 (b, a)."),
        (MAP, "From 0.000 to 1.000."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_chart_has_its_figures_in_words(chart, summary):
    assert chart.summary() == summary


def test_the_colour_of_a_series_can_be_chosen():
    chart = replace(BARS, numbers=[3, 1])
    fills = {shape.fill for shape in chart.drawing().shapes if isinstance(shape, Path) and shape.fill != "paper"}
    assert fills == {"series3", "series1", ""}


def test_a_map_has_a_heat_for_each_value():
    assert next(shape for shape in MAP.drawing().shapes if isinstance(shape, Cells)).heats == MAP.values


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: type(chart).__name__)
def test_every_chart_is_well_formed_in_pages_and_files(chart):
    for svg in (themed(chart.drawing(), chart.title), standalone(in_row([chart.titled(), chart.titled()]))):
        root = xml.etree.ElementTree.fromstring(svg)
        words = "".join(root.itertext())
        assert all(text in words for text in texts(chart.drawing()))


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: type(chart).__name__)
def test_a_file_needs_no_style_sheet(chart):
    assert "var(" not in standalone(chart.titled())
    assert "color-mix" not in standalone(chart.titled())


def test_a_file_for_browsers_brings_its_colours_for_light_and_dark():
    root = xml.etree.ElementTree.fromstring(adaptive(BARS.titled(), "what was <kept>"))
    style = root.find("{*}style").text
    assert root.get("aria-label") == "what was <kept>"
    assert f"--paper: {LIGHT['paper']}" in style.partition("prefers-color-scheme: dark")[0]
    assert f"--paper: {DARK['paper']}" in style.partition("prefers-color-scheme: dark")[2]
    assert root.find("{*}rect").get("style") == "fill:var(--paper)"


def test_shapes_lie_within_the_drawing():
    for chart in CHARTS:
        drawing = in_row([chart.titled()])
        for shape in drawing.shapes:
            points = shape.points if isinstance(shape, Path) else [(shape.x, shape.y)]
            assert all(0 <= x <= drawing.width and 0 <= y <= drawing.height for x, y in points)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_chart_is_written_in_the_format_of_its_ending(tmp_path, ending):
    file = tmp_path / f"x.{ending}"
    files.write(in_row([chart.titled() for chart in CHARTS]), file)
    assert file.read_bytes()[:4] == {"png": b"\x89PNG", "svg": b"<?xm", "pdf": b"%PDF"}[ending]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_chart_has_the_same_bytes(tmp_path, ending):
    for name in ("a", "b"):
        files.write(in_row([HEAT.titled()]), tmp_path / f"{name}.{ending}")
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_an_svg_needs_no_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("merger.charts.files.find_spec", lambda name: None)
    check_plot(tmp_path / "x.svg")
    with pytest.raises(
        RecipeError, match=r"plot='.*x\.png': needs matplotlib: pip install 'merger\[plot\]'; a name that ends in"
    ):
        check_plot(tmp_path / "x.png")


def test_an_unknown_ending_is_told_with_those_there_are(tmp_path):
    with pytest.raises(RecipeError, match=r"expected a name that ends in one of .*png.*svg"):
        check_plot(tmp_path / "x.docx")


def test_trials_are_points_with_the_best_so_far_as_steps():
    chart = trials_chart({"a": [1.0, None, 0.5, 2.0]}, "mean")
    dots, steps = chart.series
    assert dots.points == [(1, 1.0), (3, 0.5), (4, 2.0)]
    assert steps.points == [(1, 1.0), (3, 1.0), (4, 2.0)]
    assert (dots.style, steps.style) == ("dots", "steps")
