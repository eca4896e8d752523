"""The files that `merger inspect --plot` draws: every figure of the page, as PNG and as SVG with words in it."""

import xml.etree.ElementTree
from dataclasses import replace

import pytest
import torch
from checkpoints import save, trio

import merger as library
from merger import Recipe
from merger.inspection import plots
from merger.inspection.statistic import statistics

UP = "model.layers.0.mlp.up_proj.weight"
RECIPE = {"base": "base", "experts": {"code": "code", "math": "math"}, "output": {"path": "out"}}


@pytest.fixture
def inspection(tmp_path):
    """What is seen of a small recipe: curves of the whole, one view, one picture."""
    trio(tmp_path, hidden=16)
    recipe = Recipe.parse({**RECIPE, "pipeline": [{"top": {"density": 0.5}}, "sum"]}, tmp_path)
    inspection = library.inspect(recipe, curves=True, picture=UP)
    curves = replace(inspection.curves, kinds={})
    return replace(inspection, views=inspection.views[1:2], curves=curves, pictures=inspection.pictures[1:])


def words(file):
    """All text of an SVG."""
    return {text for text in xml.etree.ElementTree.parse(file).getroot().itertext() if text.strip()}


def test_every_figure_is_drawn_as_png_and_svg(inspection, tmp_path):
    files = plots.write(inspection, tmp_path / "new" / "plots")
    declared = [entry for entry in statistics("experts") if entry.view is None and entry.request is None]
    figures = [
        "top.pairs",
        *(f"top.{entry.title.replace(' ', '-')}" for entry in sorted(declared, key=lambda entry: entry.axis is None)),
        f"top.{UP}",
        "overlap-against-density",
        "uneven-rows-against-density",
    ]
    assert [file.name for file in files] == [f"{name}.{kind}" for name in figures for kind in ("png", "svg")]
    assert all(file.read_bytes()[:4] == (b"\x89PNG" if file.suffix == ".png" else b"<?xm") for file in files)
    assert {"code, math", "density", "overlap against density"} <= words(
        next(file for file in files if file.name == "overlap-against-density.svg")
    )
    assert {"model.layers.0", "mlp.up_proj", "density", "0.500"} <= words(
        tmp_path / "new" / "plots" / "top.density.svg"
    )


def test_the_same_plot_has_the_same_bytes(inspection, tmp_path):
    files, repeated_files = (
        plots.write(replace(inspection, views=[], pictures=[]), tmp_path / name) for name in ("one", "two")
    )
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in repeated_files]


def test_the_command_draws_the_figures_of_a_fine_tune(merger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "code")):
        generator = torch.Generator().manual_seed(seed)
        save(tmp_path / name, {"a.weight": torch.randn(4, 3, generator=generator)})
    ran = merger("inspect", "code", "--base", "base", "--plot", "plots", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    drawn = {file.name for file in (tmp_path / "plots").iterdir()}
    assert {"uneven-rows-against-density.png", "task_vectors.norm.svg"} <= drawn
    assert "task_vectors.pairs.png" not in drawn


def test_without_matplotlib_a_line_says_what_to_install(merger, monkeypatch):
    monkeypatch.setattr("merger.inspection.plots.find_spec", lambda name: None)
    ran = merger("inspect", "nowhere.yaml", "--plot", "plots")
    assert ran.code == 2
    assert ran.err == (
        "error: --plot needs matplotlib, which is not installed: pip install 'merger[plot]', or matplotlib\n"
    )


def test_a_place_that_is_no_folder_is_refused_before_anything_is_read(merger, tmp_path):
    (tmp_path / "file").touch()
    ran = merger("inspect", "nowhere.yaml", "--plot", tmp_path / "file")
    assert (ran.code, ran.err) == (2, f"error: --plot {tmp_path}/file: expected a folder, or a name for one\n")


def test_a_name_that_no_file_can_have_is_made_one():
    assert plots.file_name("rule1.top.h/0: x") == "rule1.top.h-0-x"
