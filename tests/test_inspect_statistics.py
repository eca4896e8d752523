"""Statistics are declared once: what a declaration is enough for, and the oracles of the survey's metrics."""

import io
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import save, trio
from rich.console import Console

import merger.engine.memory
from merger import Recipe, inspect, inspect_merge, inspect_model, merge
from merger.inspection import console, html, statistic
from merger.inspection.report import json_schema
from merger.inspection.statistics.subspaces import RANK_SHARES

ROOT = Path(__file__).parents[1]
EXPERTS = ("code", "math", "wiki")
DECLARED = [(subject, entry) for subject in ("experts", "merged") for entry in statistic.statistics(subject)]


# --- declarations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("subject", "entry"), DECLARED, ids=[f"{of}-{entry.name}" for of, entry in DECLARED])
def test_a_statistic_explains_itself(subject, entry):
    assert entry.explanation.endswith(".")
    assert entry.formula
    schema = json_schema()["$defs"]["Facts" if subject == "experts" else "Merged"]["properties"]
    assert entry.explanation in schema[entry.name]["description"]
    assert entry.formula in schema[entry.name]["description"]


def test_the_docs_have_the_declared_statistics():
    checked = subprocess.run(
        [sys.executable, ROOT / "scripts" / "statistics_table.py", "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


STATISTIC = """\
import torch

from merger.inspection.counters.vectors import VectorCounter
from merger.inspection.statistic import BY_EXPERT, share, statistic


@statistic(form=BY_EXPERT, unit="share", formula="1 - |A & B| / |A|", counters=[VectorCounter], order=1, in_layers=True)
def loneliness(vectors):
    \"""Share of an expert's positions that the other does not have.\"""
    joint = torch.tensor(vectors.joint)
    return share(joint.diagonal() - joint[0, 1], joint.diagonal())
"""


def test_one_file_is_enough_for_tables_json_page_plots_and_conditions(tmp_path):
    trio(tmp_path, hidden=16)
    recipe = "base: base\nexperts: {code: code, math: math}\nmethod: linear\noutput: {path: out}\n"
    (tmp_path / "r.yaml").write_text(recipe)
    shutil.copytree(ROOT / "merger", tmp_path / "merger", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "merger" / "inspection" / "statistics" / "loneliness.py").write_text(STATISTIC)

    def run(*arguments):
        command = [sys.executable, "-m", "merger", "inspect", "r.yaml", "-q", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    completed = run("--html", "page.html", "--plot", "plots", "--fail-if", "layer.loneliness >= 0")
    assert "loneliness" in completed.stdout
    assert completed.returncode == 1
    assert completed.stderr.startswith("error: layer.loneliness >= 0: ")
    page = (tmp_path / "page.html").read_text()
    assert "Share of an expert&#x27;s positions that the other does not have." in page
    assert (tmp_path / "plots" / "task_vectors.loneliness.png").exists()
    assert '"loneliness": {"code": ' in run("--json").stdout


# --- oracles --------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path):
    """A base and three experts with a tall, a wide and a square matrix and a vector; the task vectors in float64."""
    shapes = {"tall.weight": (40, 12), "wide.weight": (10, 30), "square.weight": (16, 16), "norm.weight": (12,)}
    generator = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save(tmp_path / "base", base)
    deltas = {name: [] for name in shapes}
    for scale, expert in enumerate(EXPERTS, 1):
        decay = {name: 0.01 * scale * 0.7 ** torch.arange(shape[-1]) for name, shape in shapes.items()}
        tuned = {
            name: base[name] + decay[name] * torch.randn(shape, generator=generator) for name, shape in shapes.items()
        }
        save(tmp_path / expert, tuned)
        for name in shapes:
            deltas[name].append((tuned[name] - base[name]).double().numpy())
    return deltas


@pytest.fixture
def recipe(tmp_path, models):
    """A recipe that adds the three experts up."""
    experts = {name: name for name in EXPERTS}
    choice = {"method": "task_arithmetic", "parameters": {"lambda": 1}}
    return Recipe.parse({"base": "base", "experts": experts, "output": {"path": "out"}, **choice}, tmp_path)


@pytest.fixture(params=[None, 48])
def inspection(recipe, request, monkeypatch):
    """The inspection with subspaces, of whole tensors and cut into slices."""
    if request.param is not None:
        monkeypatch.setattr(merger.engine.memory, "SLICE", request.param)
    return inspect(recipe, subspaces=True)


MATRICES = ("tall.weight", "wide.weight", "square.weight")


@pytest.mark.parametrize("name", MATRICES)
def test_singular_task_interference_is_the_one_norm_of_both_overlaps_around_the_singular_values(
    models, inspection, name
):
    factors = [np.linalg.svd(delta, full_matrices=False) for delta in models[name]]
    left_vectors, right_vectors = (
        np.concatenate(side, 1) for side in ([u for u, _, _ in factors], [v.T for _, _, v in factors])
    )
    values = np.diag(np.concatenate([s for _, s, _ in factors]))
    unit = np.eye(len(values))
    expected = np.abs((left_vectors.T @ left_vectors - unit) @ values @ (right_vectors.T @ right_vectors - unit)).sum()
    assert inspection.view("task_vectors").tensors[name].task_interference == pytest.approx(expected, rel=1e-6)


def centred(deltas):
    return [delta - sum(deltas) / len(deltas) for delta in deltas]


def ranks(delta):
    return [max(1, int(share * min(delta.shape))) for share in RANK_SHARES]


@pytest.mark.parametrize("name", MATRICES)
def test_row_space_interference_is_summed_over_pairs_of_centred_experts_at_each_rank(models, inspection, name):
    factors = [np.linalg.svd(delta, full_matrices=False) for delta in centred(models[name])]
    expected = []
    for k in ranks(models[name][0]):
        weighted = [np.diag(s[:k] / np.linalg.norm(s[:k])) @ v[:k] for _, s, v in factors]
        expected.append(sum(np.linalg.norm(a @ b.T) for a, b in itertools.permutations(weighted, 2)))
    assert inspection.view("task_vectors").tensors[name].row_interference == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", MATRICES)
def test_the_reconstruction_error_is_what_truncation_leaves_of_centred_experts(models, inspection, name):
    expected = []
    for k in ranks(models[name][0]):
        error = 0.0
        for delta in centred(models[name]):
            u, s, v = np.linalg.svd(delta, full_matrices=False)
            error += np.linalg.norm(delta - u[:, :k] @ np.diag(s[:k]) @ v[:k]) ** 2
        expected.append(error)
    errors = inspection.view("task_vectors").tensors[name].reconstruction_error
    assert errors == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", MATRICES)
def test_the_alignment_ratio_is_the_length_of_an_expert_in_the_directions_of_the_merge(models, inspection, name):
    merged = sum(models[name])
    u, s, _ = np.linalg.svd(merged)
    residuals = [np.sqrt((s[k:] ** 2).sum()) for k in range(len(s) + 1)]
    k = next(k for k, residual in enumerate(residuals) if residual <= 0.05 * np.linalg.norm(merged))
    expected = [np.linalg.norm(u[:, :k].T @ delta) / np.linalg.norm(delta) for delta in models[name]]
    assert 0 < k < len(s)
    result = inspection.view("result").tensors[name].alignment
    assert list(result.values()) == pytest.approx(expected, rel=1e-5)


def test_a_finished_merge_has_the_alignment_that_its_recipe_foretold(recipe, inspection):
    merge(recipe)
    result = inspect_merge(recipe.folder / "out", subspaces=True).view("result").whole.alignment
    assert list(result.values()) == pytest.approx(list(inspection.view("result").whole.alignment.values()), rel=1e-3)


def test_a_model_has_the_mean_of_interference_by_size_and_the_sum_of_errors(inspection):
    tensors = [inspection.view("task_vectors").tensors[name] for name in MATRICES]
    facts = inspection.view("task_vectors").whole
    weights = [values.elements for values in tensors]
    assert facts.task_interference == pytest.approx(np.average([v.task_interference for v in tensors], weights=weights))
    assert facts.row_interference == pytest.approx(
        np.average([v.row_interference for v in tensors], axis=0, weights=weights)
    )
    assert facts.reconstruction_error == pytest.approx(np.sum([v.reconstruction_error for v in tensors], axis=0))


def test_a_vector_has_no_subspaces_and_nobody_waits_for_those_that_were_not_asked_for(recipe, inspection):
    assert inspection.view("task_vectors").tensors["norm.weight"].task_interference is None
    assert inspection.view("result").tensors["norm.weight"].alignment is None
    default = inspect(recipe)
    assert default.view("task_vectors").whole.task_interference is None
    assert default.view("result").whole.alignment is None


def saved(tmp_path, base, *experts, method="linear", parameters=None):
    """Saves matrices as models base, a, b, .., and makes a recipe of them."""
    names = "abc"[: len(experts)]
    for name, matrix in zip(("base", *names), (base, *experts), strict=True):
        save(tmp_path / name, {"x.weight": matrix})
    choice = {"method": method, "parameters": parameters or {}}
    sources = {name: name for name in names}
    return Recipe.parse({"base": "base", "experts": sources, "output": {"path": "out"}, **choice}, tmp_path)


def test_orthogonal_experts_do_not_interfere(tmp_path):
    base = torch.zeros(6, 4)
    changed_first, changed_second = base.clone(), base.clone()
    changed_first[0, 0], changed_second[1, 1] = 1, 2
    facts = inspect(saved(tmp_path, base, changed_first, changed_second), subspaces=True).view("task_vectors").whole
    assert facts.task_interference == pytest.approx(0)


def test_experts_that_are_one_leave_nothing_when_centred(tmp_path):
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    facts = inspect(saved(tmp_path, base, base + 1, base + 1), subspaces=True).view("task_vectors").whole
    assert facts.row_interference == [0] * len(RANK_SHARES)
    assert facts.reconstruction_error == pytest.approx([0] * len(RANK_SHARES), abs=1e-12)


def test_an_expert_that_changed_nothing_has_no_alignment(tmp_path):
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    inspection = inspect(saved(tmp_path, base, base + 1, base), subspaces=True)
    assert inspection.view("result").whole.alignment == {"a": pytest.approx(1), "b": 0}
    assert inspection.view("task_vectors").whole.task_interference == 0


def test_a_condition_about_alignment_asks_for_subspaces(merger, recipe, monkeypatch):
    monkeypatch.chdir(recipe.folder)
    (recipe.folder / "r.yaml").write_text(
        "base: base\nexperts: {code: code, math: math}\nmethod: linear\noutput: {path: out}\n"
    )
    ran = merger("inspect", "r.yaml", "--fail-if", "alignment <= 1")
    assert ran.code == 1
    assert ran.err.startswith("error: alignment <= 1: ")
    assert "(result)" in ran.err


# --- overlap against CABS's target ----------------------------------------------------------------


@pytest.mark.parametrize(("method", "parameters"), [("cabs", {"n": 1, "m": 4}), ("cabs_low_overlap", {"n": 3, "m": 4})])
def test_cabs_meets_its_target(tmp_path, method, parameters):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(8, 8, generator=generator) for _ in range(3)]
    inspection = inspect(saved(tmp_path, *matrices, method=method, parameters=parameters))
    excess = inspection.merging()[0].whole.overlap_excess
    assert [value for row in excess.values() for value in row.values()] == pytest.approx([0, 0])


def test_the_excess_is_the_overlap_above_the_least_that_the_densities_allow(tmp_path):
    base = torch.zeros(2, 5)
    first = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])  # 8 of 10
    contained = torch.tensor([[1.0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])  # 4 of 10, all of them the first's; 2 would do
    excess = inspect(saved(tmp_path, base, first, contained)).view("task_vectors").whole.overlap_excess
    assert excess == {"a": {"b": pytest.approx((4 - 2) / 8)}, "b": {"a": pytest.approx((4 - 2) / 4)}}


# --- relative size --------------------------------------------------------------------------------


def test_the_relative_size_is_the_length_of_the_change_by_that_of_the_base(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator)
    change = 0.02 * torch.randn(40, 30, generator=generator)
    monkeypatch.setattr(merger.engine.memory, "SLICE", 64)
    inspection = inspect(saved(tmp_path, base, base + change))
    expected = np.linalg.norm((base + change - base).double()) / np.linalg.norm(base.double())
    assert inspection.view("task_vectors").whole.relative_size == {"a": pytest.approx(expected, rel=1e-9)}


def printed(inspection):
    terminal = Console(width=200, record=True, file=io.StringIO())
    console.print_inspection(inspection, terminal)
    return terminal.export_text()


@pytest.mark.parametrize(("scale", "sentence"), [(0.02, "as fine-tunes do"), (2.0, "check that a was trained from")])
def test_a_sentence_reads_the_relative_size_in_tables_and_page(tmp_path, scale, sentence):
    generator = torch.Generator().manual_seed(0)
    base, change = (torch.randn(40, 30, generator=generator) for _ in range(2))
    inspection = inspect(saved(tmp_path, base, base + scale * change))
    assert sentence in printed(inspection)
    assert sentence in html.page(inspection)


def test_an_unrelated_model_is_larger_than_any_fine_tune(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tune"):
        save(tmp_path / name, {"x.weight": torch.randn(40, 30, generator=generator)})
    inspection = inspect_model(str(tmp_path / "tune"), str(tmp_path / "base"))
    assert inspection.view("task_vectors").whole.relative_size["tune"] > 1
