"""No command removes or replaces a file that merger did not write, and what it replaces is replaced in one step."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from merger.calibration import statistics_files
from merger.calibration.moments import Moments
from merger.calibration.settings import ForwardPass, Settings
from merger.checkpoint import files
from merger.checkpoint.files import MARK, check_replaceable, replace_bytes, replacing
from merger.demo import demo
from merger.errors import RecipeError, ResourceError
from merger.evaluation.measures import Outcome
from merger.evaluation.plots import check_plot
from merger.evaluation.search import results
from merger.evaluation.search.record import Record
from merger.inspection import plots

RECIPE = "base: base\nexperts: {code: code, math: math}\nmethod: linear\noutput: {path: out}\n"
THESIS = b"my thesis, without a line break at its end"


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- one file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"x" * 200_000 + MARK.encode(), MARK.encode() + b"x" * 200_000])
def test_an_empty_file_or_one_that_merger_marked_may_be_replaced(tmp_path, content):
    (tmp_path / "page").write_bytes(content)
    check_replaceable(tmp_path / "page")


def test_any_other_file_may_not(tmp_path):
    (tmp_path / "page").write_bytes(THESIS)
    with pytest.raises(RecipeError, match="page: is there already, and merger did not write it; move it"):
        check_replaceable(tmp_path / "page")


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_beside(tmp_path):
    (tmp_path / "page").write_bytes(b"old")

    def fail():
        with replacing(tmp_path / "page") as new:
            new.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="page: the disk is full"):
        fail()
    assert everything(tmp_path) == {tmp_path / "page": b"old"}


def test_a_file_that_is_replaced_keeps_its_permissions_and_the_links_to_it(tmp_path):
    (tmp_path / "page").write_bytes(b"old")
    (tmp_path / "page").chmod(0o600)
    (tmp_path / "link").symlink_to("page")
    replace_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "page").read_bytes() == b"new"
    assert (tmp_path / "page").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "link").is_symlink()


# --- commands -------------------------------------------------------------------------------------


def test_lock_replaces_a_lock_and_nothing_else(merger, folder):
    assert merger("lock", "recipe.yaml").code == 0
    assert merger("lock", "recipe.yaml", "--set", "seed=1").code == 0
    assert json.loads((folder / "recipe.lock").read_text())["recipe"]["seed"] == 1
    for content in (THESIS, b'{"format": 1, "packages": []}'):
        (folder / "recipe.lock").write_bytes(content)
        ran = merger("lock", "recipe.yaml")
        assert (ran.code, ran.out) == (2, "")
        assert ran.err == (
            "error: recipe.lock: is there already, and merger did not write it; move it, or choose another name\n"
        )
        assert (folder / "recipe.lock").read_bytes() == content


def test_a_lock_that_cannot_be_written_leaves_the_old_one(merger, folder, monkeypatch):
    assert merger("lock", "recipe.yaml").code == 0
    contents_before = everything(folder)

    def fail(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    ran = merger("lock", "recipe.yaml", "--set", "seed=1")
    assert (ran.code, ran.err) == (4, "error: recipe.lock: the disk is full; free some space, or write elsewhere\n")
    assert everything(folder) == contents_before


def test_a_page_of_an_inspection_replaces_a_page_and_nothing_else(merger, folder):
    assert merger("inspect", "recipe.yaml", "--html", "page.html").code == 0
    assert merger("inspect", "recipe.yaml", "--html", "page.html").code == 0
    (folder / "page.html").write_bytes(THESIS)
    ran = merger("inspect", "nowhere.yaml", "--html", "page.html")
    assert ran.code == 2
    assert ran.err.startswith("error: --html page.html: is there already, and merger did not write it; move it")
    assert (folder / "page.html").read_bytes() == THESIS


def test_plots_go_to_a_folder_of_plots_and_not_among_other_pictures(merger, folder):
    pytest.importorskip("matplotlib")
    assert merger("inspect", "recipe.yaml", "--plot", "plots", "-q").code == 0
    drawn = everything(folder / "plots")
    assert all(MARK.encode() in content for content in drawn.values())
    plots.check(folder / "plots")
    (folder / "plots" / "cat.png").write_bytes(b"\x89PNG a cat")
    with pytest.raises(RecipeError, match=r"plot='.*plots': cat\.png: is there already, and merger did not write it"):
        plots.check(folder / "plots")


@pytest.mark.parametrize("kind", ["png", "svg", "pdf", "eps", "jpg"])
def test_a_plot_replaces_a_plot_and_nothing_else(tmp_path, kind):
    pytest.importorskip("matplotlib")
    from merger.evaluation.plots import plot_trials

    path = tmp_path / f"trials.{kind}"
    plot_trials({"a": [0.1, 0.2]}, "mean", path)
    if kind == "jpg":  # which can hold no mark
        with pytest.raises(RecipeError, match="merger did not write it"):
            check_plot(path)
    else:
        check_plot(path)
    path.write_bytes(THESIS)
    with pytest.raises(RecipeError, match="merger did not write it"):
        check_plot(path)


def test_calibration_copies_statistics_over_statistics_and_nothing_else(tmp_path):
    key = statistics_files.StatisticsKey(
        "checkpoint", "data", "tokenizer", Settings(), ForwardPass("cpu", "float32", torch="2", transformers="5")
    )
    source = tmp_path / "cache" / "a"
    statistics_files.save(source, {"w": Moments(torch.tensor(1), torch.ones(2), torch.ones(2))}, key)
    for _ in range(2):
        copies = statistics_files.copy({"code": source}, tmp_path / "to")
    assert copies == {"code": tmp_path / "to" / "code.stats.safetensors"}
    assert copies["code"].read_bytes() == source.read_bytes()
    copies["code"].write_bytes(THESIS)
    with pytest.raises(RecipeError, match=r"code\.stats\.safetensors: is there already, and merger did not write it"):
        statistics_files.copy({"code": source}, tmp_path / "to")
    assert copies["code"].read_bytes() == THESIS


@pytest.mark.parametrize("force", [False, True])
def test_a_search_touches_no_file_that_is_no_record(tmp_path, force):
    (tmp_path / "trials.jsonl").write_bytes(THESIS)
    with pytest.raises(RecipeError, match="is no record of a search; give another folder with to=FOLDER, or move"):
        Record(tmp_path / "trials.jsonl", {"recipe": "1"}, force=force)
    assert everything(tmp_path) == {tmp_path / "trials.jsonl": THESIS}


@pytest.mark.parametrize("name", [results.BEST, results.REPORT])
def test_a_search_begins_in_no_folder_with_a_recipe_or_report_of_someone(tmp_path, name):
    results.check_folder(tmp_path / "new")
    (tmp_path / name).write_bytes(THESIS)
    with pytest.raises(RecipeError, match=f"{name}: is there already, and merger did not write it"):
        results.check_folder(tmp_path)


def test_two_searches_do_not_write_one_record(tmp_path):
    first = Record(tmp_path / "trials.jsonl", {"recipe": "1"})
    with pytest.raises(RecipeError, match=r"trials\.jsonl: another run is writing it; wait for it or stop it"):
        Record(tmp_path / "trials.jsonl", {"recipe": "1"})
    first.add_outcomes("base", {"task": Outcome(np.ones(1), np.ones(1))})
    first.close()
    reopened = Record(tmp_path / "trials.jsonl", {"recipe": "1"})
    assert reopened.outcomes("base").keys() == {"task"}
    reopened.close()


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "demo"
    demo.prepare(folder)
    return folder


def test_an_earlier_demo_is_made_again_and_other_files_in_its_folder_stay(demo_folder, tmp_path):
    shutil.copytree(demo_folder, tmp_path / "demo")
    (tmp_path / "demo" / "thesis.txt").write_bytes(THESIS)
    (tmp_path / "demo" / "models" / "mine").mkdir()
    (tmp_path / "demo" / "models" / "mine" / "notes").write_bytes(THESIS)
    contents_before = everything(tmp_path)
    (tmp_path / "demo" / "data" / "shift.jsonl").unlink()
    demo.prepare(tmp_path / "demo", force=True)
    assert everything(tmp_path) == contents_before


def test_a_demo_whose_recipe_was_edited_is_not_overwritten(demo_folder, tmp_path):
    shutil.copytree(demo_folder, tmp_path / "demo")
    (tmp_path / "demo" / "recipe.yaml").write_bytes(THESIS)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: is not as the demo wrote it; move it, or choose another"):
        demo.prepare(tmp_path / "demo", force=True)
    assert (tmp_path / "demo" / "recipe.yaml").read_bytes() == THESIS


def test_a_demo_that_was_stopped_leaves_no_half_written_file(tmp_path, monkeypatch):
    def fail(path):
        raise ResourceError("the disk is full")

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(ResourceError):
        demo.prepare(tmp_path / "demo")
    assert everything(tmp_path) == {}
