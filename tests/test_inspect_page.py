"""The page that `merger inspect --html` writes: whole in itself, well formed, and with every number in its place."""

import re
import xml.etree.ElementTree
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import pytest
import torch
from checkpoints import CONFIG, llama, save, trio

import merger as library
from merger import Recipe
from merger.charts.paint import series_paint, strength
from merger.evaluation.plots import trials_chart
from merger.inspection import Curve, Curves
from merger.inspection.figures import colours, curve_charts
from merger.inspection.html import page
from merger.inspection.statistic import BY_PAIR, statistics

UP = "model.layers.0.mlp.up_proj.weight"


class Reader(HTMLParser):
    """Reads a page; every element that is opened must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


def charts(text):
    """The charts of a page as (title, root element), in their order."""
    figures = re.findall(r"<figcaption><b>(.*?)</b>: .*?</figcaption><div [^>]*>(<svg.*?</svg>)", text, re.DOTALL)
    return [(title, xml.etree.ElementTree.fromstring(svg)) for title, svg in figures]


def rows(chart):
    """The lines of a heatmap below its headings: the row's name, then its numbers from left to right."""
    lines = {}
    for text in chart.iter("text"):
        lines.setdefault(float(text.get("y")), []).append((float(text.get("x")), text.text))
    words = [[word for _, word in sorted(line)] for line in lines.values()]
    return [line for line in words if all(re.fullmatch(r"-?[\d.]+", word) for word in line[1:])]


def cells(text):
    """The numbers of every heatmap by title and row; of several views, one after the other."""
    numbers = {}
    for title, chart in charts(text):
        for name, *values in rows(chart):
            numbers.setdefault((title, name), []).extend(values)
    return numbers


@pytest.fixture
def inspection(tmp_path):
    """What is seen of a small recipe, with a picture."""
    trio(tmp_path, hidden=16)
    content = {"base": "base", "experts": {"code": "code", "math": "math"}, "output": {"path": "out"}}
    recipe = Recipe.parse({**content, "pipeline": [{"top": {"density": 0.5}}, "sum"]}, tmp_path)
    return library.inspect(recipe, picture=UP, curves=True)


def test_a_page_needs_nothing_but_itself(inspection):
    text = page(inspection)
    read = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not {"src"} & {name for name, _ in read.attributes}
    assert all(value.startswith("#") for name, value in read.attributes if name == "href")
    assert "http" not in text
    assert "url(" not in text


def test_a_page_has_a_section_for_every_view(inspection):
    headings = re.findall("<h2[^>]*>(.*?)</h2>", page(inspection))
    assert headings == ["task_vectors", "top", "result", "Against density"]  # the recipe's own stages before the sweep


def test_a_heatmap_has_the_number_of_every_layer_and_projection(inspection):
    numbers = cells(page(inspection))
    expected = [f"{facts.at_base:.3f}" for facts in inspection.view("result").cells["model.layers.1"].values()]
    assert numbers["at base", "model.layers.1"] == expected
    assert numbers["at base outside the blocks", "lm_head"] == [
        f"{inspection.view('result').tensors['lm_head.weight'].at_base:.3f}"
    ]


def test_small_tensors_have_a_chart_and_so_colours_of_their_own(tmp_path):
    trio(tmp_path, hidden=64, layers=1)
    inspection = library.inspect_model(str(tmp_path / "code"), str(tmp_path / "base"))
    numbers = cells(page(inspection))
    assert len(numbers["norm", "model.layers.0"]) == 7
    assert len(numbers["norm of small tensors", "model.layers.0"]) == 2


def test_an_overlap_matrix_has_both_ways_of_every_pair(inspection):
    numbers = cells(page(inspection))
    for expert, peer in (("code", "math"), ("math", "code")):
        both_views = [f"{inspection.view(view).whole.overlap[expert][peer]:.3f}" for view in ("task_vectors", "top")]
        assert numbers["overlap", expert] == both_views


def test_a_map_paints_every_cell_once(inspection):
    maps = [chart for title, chart in charts(page(inspection)) if title in ("code", "math")]
    assert len(maps) == 4  # two experts in two views
    for chart in maps:
        cells = next(group for group in chart.iter("g") if group.get("class") == "cells")
        assert "".join(path.get("d") for path in cells.iter("path")).count("h1v1h-1z") == 16 * 32


def lines(chart):
    """The dashes and the points of every line of a series: [(dashes, [(x, y), ..]), ..]."""
    series = []
    for group in chart.iter("g"):
        style = dict(item.split(":") for item in (group.get("style") or "").split(";") if ":" in item)
        if "--series" in style.get("stroke", "") and style["fill"] == "none":
            for path in group.iter("path"):
                points = [tuple(map(float, point.split())) for point in path.get("d")[1:].split("L")]
                series.append((style.get("stroke-dasharray"), points))
    return [line for line in series if len(line[1]) > 2]


def test_a_curve_is_a_line_for_magnitude_and_a_dashed_one_for_random_masks_of_every_pair_and_expert(inspection):
    overlap, uneven = (chart for title, chart in charts(page(inspection)) if title.endswith("against density"))
    assert [dashes for dashes, _ in lines(overlap)] == ["7 5", None]
    assert [dashes for dashes, _ in lines(uneven)] == ["7 5", None, "7 5", None]
    assert all(len(points) == 11 for chart in (overlap, uneven) for _, points in lines(chart))


def test_a_curve_goes_through_its_numbers(inspection):
    overlap = next(chart for title, chart in charts(page(inspection)) if title == "overlap against density")
    points = lines(overlap)[1][1]
    height = points[0][1] - points[-1][1]
    expected = inspection.curves.whole.overlap["code"]["math"]
    assert height / 300 == pytest.approx(expected[-1] - expected[0], abs=1e-3)


def test_the_whole_model_and_every_kind_of_matrix_have_curves(inspection):
    titles = [title for title, _ in charts(page(inspection)) if title.startswith("overlap against density")]
    kinds = ("", ", kind embedding", ", kind head", ", kind linear")
    assert sorted(titles) == [f"overlap against density{of}" for of in kinds]


def test_a_page_without_curves_has_no_chart_against_density(inspection):
    assert "against density" not in page(replace(inspection, curves=None))


def test_names_are_text_and_never_markup(tmp_path):
    for seed, name in enumerate(("base", "code")):
        generator = torch.Generator().manual_seed(seed)
        save(tmp_path / name, {"<b>x.weight": torch.randn(2, 2, generator=generator)}, CONFIG)
    recipe = {"base": "base", "experts": {"code": "code"}, "method": "linear", "output": {"path": "out"}}
    text = page(library.inspect(Recipe.parse(recipe, tmp_path)))
    assert "&lt;b&gt;x" in text
    assert "<b>x" not in text
    Reader(text)


@pytest.mark.parametrize("unchanged", [True, False])
def test_a_model_that_changed_nothing_still_has_a_page(tmp_path, unchanged):
    save(tmp_path / "base", llama(0))
    save(tmp_path / "tune", llama(0 if unchanged else 1))
    text = page(library.inspect_model(str(tmp_path / "tune"), str(tmp_path / "base")))
    assert "Where a fine-tune changed" in text
    assert "sign conflict" not in Reader(text).words
    Reader(text)


def test_the_command_writes_the_page_beside_its_tables(merger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trio(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "base: base\nexperts: {code: code, math: math}\nmethod: ties\noutput: {path: out}\n"
    )
    ran = merger("inspect", "r.yaml", "--html", "page.html", "--tensor", UP)
    assert (ran.code, ran.err) == (0, "")
    assert "layer (top)" in ran.out
    assert f"{UP} (top): density in equal cells" in (tmp_path / "page.html").read_text()


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(merger, tmp_path):
    ran = merger("inspect", tmp_path / "none.yaml", "--html", tmp_path / "no" / "page.html")
    assert (ran.code, ran.err) == (
        2,
        f"error: --html {tmp_path}/no/page.html: expected a file in a folder that is there\n",
    )


def test_an_expert_has_one_colour_in_tables_lines_heats_and_maps_and_pairs_have_others(inspection):
    text = page(inspection)
    for i, name in enumerate(("code", "math")):
        assert f'background:var(--series{i})"></span>{name}</th>' in text
        in_its_colour = [title for title, chart in charts(text) if full_heat(i) in heats(chart)]
        assert {name, f"at {name}"} <= set(in_its_colour)
    numbers = colours(["code", "math", "wiki"])
    assert list(numbers.values()) == list(range(6))
    assert list(numbers)[3:] == ["code, math", "code, wiki", "math, wiki"]


def full_heat(number):
    """The strongest heat in the colour of an expert."""
    return f"var(--{series_paint(number)}) {strength(1, series_paint(number)):.1%}"


def heats(chart):
    return " ".join(path.get("style", "") for path in chart.iter("path"))


def test_the_colour_of_a_pair_does_not_depend_on_its_rank(inspection):
    pairs = {"code": {"math": [0.1], "wiki": [0.9]}, "math": {"wiki": [0.5], "code": [0.1]}, "wiki": {}}
    uneven = {name: [0.1] for name in pairs}
    curve = Curve([0.5], pairs, pairs, uneven, uneven)
    overlap = curve_charts(Curves(curve, {}))[0]
    assert {line.name: line.number for line in overlap.series if line.name} == {
        "code, wiki": 4,
        "math, wiki": 5,
        "code, math": 3,
    }


def test_every_column_of_a_view_is_explained_by_the_sentence_of_its_statistic(inspection):
    text = page(inspection)
    for entry in (entry for subject in ("experts", "merged") for entry in statistics(subject)):
        shown = entry.view in (None, "task_vectors") and entry.request is None
        if shown and entry.form is not BY_PAIR and entry.axis is None:
            assert re.search(f'<th [^>]*title="[^"]*{re.escape(escape(entry.explanation))}', text), entry.name


def test_the_title_of_a_chart_that_does_not_begin_at_0_says_so():
    assert trials_chart({"a": [1.0, 2.0]}, "kept").caption.endswith("the scale does not begin at 0")
