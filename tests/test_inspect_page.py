"""The page that `merger inspect --html` writes: whole in itself, well formed, and with every number in its place."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from checkpoints import CONFIG, llama, save, trio

import merger as library
from merger import Recipe
from merger.inspection.html import page

UP = "model.layers.0.mlp.up_proj.weight"


class Reader(HTMLParser):
    """Reads a page; what is opened must be closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.cells = {}  # by the figure's caption and the row's name
        self.caption, self.row = "", None
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
        if self.open[-1:] == ["figcaption"]:
            self.caption = text.partition(":")[0]
        if self.open[-2:] == ["tr", "th"]:
            self.row = text
        if self.open[-1:] == ["td"]:
            self.cells.setdefault((self.caption, self.row), []).append(text)


@pytest.fixture
def seen(tmp_path):
    """What is seen of a small recipe, with a picture."""
    trio(tmp_path, hidden=16)
    written = {"base": "base", "experts": {"code": "code", "math": "math"}, "output": {"path": "out"}}
    recipe = Recipe.parse({**written, "pipeline": [{"top": {"density": 0.5}}, "sum"]}, tmp_path)
    return library.inspect(recipe, picture=UP, curves=True)


def test_a_page_needs_nothing_but_itself(seen):
    text = page(seen)
    read = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not {"src", "href"} & {name for name, _ in read.attributes}
    assert "http" not in text
    assert "url(" not in text


def test_a_page_has_a_section_for_every_view(seen):
    headings = re.findall("<h2>(.*?)</h2>", page(seen))
    assert headings == ["task_vectors", "top", "result"]


def test_a_heatmap_has_the_number_of_every_layer_and_projection(seen):
    cells = Reader(page(seen)).cells
    expected = [f"{facts.at_base:.3f}" for facts in seen.view("result").cells["model.layers.1"].values()]
    assert cells["at the base", "model.layers.1"] == expected
    assert cells["at the base outside the blocks", "lm_head"] == [
        f"{seen.view('result').tensors['lm_head.weight'].at_base:.3f}"
    ]


def test_small_tensors_have_a_figure_and_so_colours_of_their_own(tmp_path):
    trio(tmp_path, hidden=64, layers=1)
    seen = library.inspect_model(str(tmp_path / "code"), str(tmp_path / "base"))
    cells = Reader(page(seen)).cells
    assert len(cells["norm", "model.layers.0"]) == 7
    assert len(cells["norm of small tensors", "model.layers.0"]) == 2


def test_an_overlap_matrix_has_both_ways_of_every_pair(seen):
    cells = Reader(page(seen)).cells
    for one, other in (("code", "math"), ("math", "code")):
        both = [f"{seen.view(view).whole.overlap[one][other]:.3f}" for view in ("task_vectors", "top")]
        assert cells["overlap", one] == both


def test_the_strongest_colour_is_the_greatest_value_and_the_weakest_the_least(seen):
    found = re.findall(r'--v:([\d.]+)">(?=[\d.]+</td>)', page(seen))
    assert {"0.000", "1.000"} <= set(found)
    assert all(0 <= float(value) <= 1 for value in found)


def test_text_is_light_where_the_ground_is_deep_and_only_there(seen):
    for deep, value in re.findall(r'class="heat( deep)?" style="--v:([\d.]+)"', page(seen)):
        assert bool(deep) == (float(value) > 0.6)


def test_a_picture_paints_every_piece_once(seen):
    text = page(seen)
    maps = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)" preserveAspectRatio.*?</svg>', text)
    assert maps == [("16", "32")] * 4  # two experts in two views
    assert text.count("h1v1h-1z") == 4 * 16 * 32


def test_a_chart_has_a_line_and_a_mark_at_each_density_for_every_pair_and_expert(seen):
    overlap, uneven = re.findall(r'<svg class="chart".*?</svg>', page(seen))[:2]
    assert (overlap.count('class="line l'), uneven.count('class="line l')) == (2, 4)  # by magnitude, and at random
    assert (overlap.count('class="mark'), uneven.count('class="mark')) == (11, 22)
    x, y = re.findall(r'class="line l0" d="M([\d.]+) ([\d.]+)L', overlap)[0]
    first = seen.curves.whole.overlap["code"]["math"][0]
    assert (float(x), float(y)) == (22, pytest.approx(300 - 300 * first, abs=0.1))


def test_the_whole_model_and_every_kind_of_matrix_have_charts(seen):
    captions = re.findall("<figcaption>(overlap against density.*?):", page(seen))
    kinds = ("", ", kind embedding", ", kind head", ", kind linear")
    assert sorted(captions) == [f"overlap against density{of}" for of in kinds]


def test_a_page_without_curves_has_no_chart(seen):
    assert '<svg class="chart"' not in page(replace(seen, curves=None))


def test_names_are_text_and_never_markup(tmp_path):
    for seed, name in enumerate(("base", "code")):
        generator = torch.Generator().manual_seed(seed)
        save(tmp_path / name, {"<b>x.weight": torch.randn(2, 2, generator=generator)}, CONFIG)
    recipe = {"base": "base", "experts": {"code": "code"}, "method": "linear", "output": {"path": "out"}}
    text = page(library.inspect(Recipe.parse(recipe, tmp_path)))
    assert "&lt;b&gt;x" in text
    assert "<b>" not in text
    Reader(text)


@pytest.mark.parametrize("same", [True, False])
def test_a_model_that_changed_nothing_still_has_a_page(tmp_path, same):
    save(tmp_path / "base", llama(0))
    save(tmp_path / "tune", llama(0 if same else 1))
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
    assert f"{UP}: density in equal pieces" in (tmp_path / "page.html").read_text()


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(merger, tmp_path):
    ran = merger("inspect", tmp_path / "none.yaml", "--html", tmp_path / "no" / "page.html")
    assert (ran.code, ran.err) == (
        2,
        f"error: --html {tmp_path}/no/page.html: expected a file in a folder that is there\n",
    )
