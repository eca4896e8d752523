"""The notebooks of docs/notebooks: their cells run in order, and what a notebook needs of the library."""

from __future__ import annotations

import ast
import json

import pytest
from markdown import ROOT

import merger
from merger.demo import demo
from merger.pipeline import registry

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """Methods that a notebook registers are forgotten after the test."""
    monkeypatch.setattr(registry, "ENTRIES", registry.ENTRIES)
    before = dict(registry.ENTRIES)
    yield
    registry.ENTRIES.clear()
    registry.ENTRIES.update(before)


def run_cell(source, namespace):
    """Runs a cell as a notebook does; returns the value of its last expression, or None."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


def code_cells(path):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_in_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for cell in code_cells(path):
        shown = run_cell(cell, namespace)
        assert len(repr(shown)) < 2000, cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert [cell["outputs"] for cell in cells if cell["cell_type"] == "code" and cell["outputs"]] == []


def test_a_cell_that_is_run_again_replaces_its_method(tmp_path):
    recipe = demo.prepare(tmp_path / "demo")
    cell = """
from torch import Tensor
from merger.pipeline.registry import merger as as_merger

@as_merger()
def loudest(deltas: Tensor, *, sign: int = 1) -> Tensor:
    return deltas[0] * SIGN
"""
    merged = []
    for sign in ("1", "-1"):
        run_cell(cell.replace("SIGN", sign), {"__name__": "__main__"})
        merger.Recipe.load(recipe, ["method=loudest", "parameters={}"])
        tensors = {"w": demo_tensor(1.0)}
        merged.append(
            merger.merge_tensors("loudest", {"w": demo_tensor(0.0)}, {"a": tensors, "b": tensors})["w"].item()
        )
    assert merged == [1.0, -1.0]


def demo_tensor(value):
    import torch

    return torch.tensor([value])
