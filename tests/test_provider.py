"""A new input of stages: its provider and a method that takes it, from this file alone, run streamed."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file

import merger.calibration.providers
import merger.engine.memory
from merger import Recipe, merge
from merger.calibration import provider
from merger.calibration.provider import Cost, register
from merger.errors import RecipeError
from merger.ops.arithmetic import summed
from merger.pipeline.inputs import INPUTS, StageInput, by_row
from merger.pipeline.registry import ENTRIES, supplied
from merger.pipeline.registry import merger as register_merger

ROWS, COLUMNS = 12, 8


@dataclass
class RowNumbers:
    """A number for each row of every matrix under the name ``name``: of row i of expert k, i * (k + 1) * ``factor``."""

    name: str = "age"
    factor: int = 1
    searches: int = 0

    @property
    def inputs(self):
        return (StageInput(self.name, "model", by_row, needs_text=False),)

    @property
    def supplies(self):
        return frozenset({self.name})

    def cost(self, plan):
        return Cost(making=1 << 40)

    def slice_bytes(self, part, experts):
        return 0

    def origins(self, plan):
        return {}

    def files(self, plan, options, hidden_memory):
        self.searches += 1
        paths = {name: plan.recipe.folder / f"{name}.{self.name}.json" for name in plan.recipe.experts}
        for k, path in enumerate(paths.values()):
            path.write_text(json.dumps([row * (k + 1) * self.factor for row in range(ROWS)]))
        return paths

    def open(self, plan, files):
        numbers = [json.loads(path.read_text()) for path in files.values()]
        return RowNumberSource(self.name, torch.tensor(numbers, dtype=torch.float32))


@dataclass
class RowNumberSource:
    name: str
    numbers: torch.Tensor  # [k r]

    def of_part(self, tensor, part, note):
        return {self.name: self.numbers}


@pytest.fixture
def aged(monkeypatch):
    """The input `age`, its provider and the method `aged_sum`, for one test."""

    def aged_sum(deltas, age, *, lambda_: float = 1.0):
        """Adds the task vectors, each row times its age."""
        return summed(deltas * age) * lambda_

    aged_sum.__annotations__ = {"lambda_": "float"}
    monkeypatch.setattr(provider, "_PROVIDERS", list(provider._PROVIDERS))  # after those of merger are imported
    register(RowNumbers())
    register_merger()(aged_sum)
    yield
    del INPUTS["age"], ENTRIES["aged_sum"]
    supplied.cache_clear()


@pytest.mark.parametrize("elements", [COLUMNS * 5, 1 << 19], ids=["in slices", "in one piece"])
def test_an_input_and_its_method_run_streamed_from_one_file(tmp_path, monkeypatch, aged, elements):
    monkeypatch.setattr(merger.engine.memory, "SLICE", elements)
    base = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    for label, change in {"base": 0, "code": 1, "math": 2}.items():
        save(tmp_path / label, {"model.layers.0.mlp.up_proj.weight": base + change})
    content = {"base": "base", "experts": {"code": "code", "math": "math"}, "pipeline": ["aged_sum"]}

    merge(Recipe.parse({**content, "output": {"path": "out"}}, tmp_path))

    (merged,) = load_file(tmp_path / "out" / "model.safetensors").values()
    rows = torch.arange(ROWS, dtype=torch.float32).view(-1, 1)
    assert torch.equal(merged, base + rows * 1 * 1 + rows * 2 * 2)
    manifest = json.loads((tmp_path / "out" / "merger.json").read_text())
    assert sorted(manifest["statistics"]) == ["code", "math"]


def test_its_cost_is_in_the_forecast(tmp_path, aged):
    for label in ("base", "code"):
        save(tmp_path / label, {"model.layers.0.mlp.up_proj.weight": torch.ones(ROWS, COLUMNS)})
    recipe = {"base": "base", "experts": {"code": "code"}, "pipeline": ["aged_sum"], "output": {"path": "out"}}
    with pytest.raises(merger.ResourceError, match="this merge needs about 1,099"):
        merge(Recipe.parse(recipe, tmp_path), merger.RunOptions(max_memory=1 << 30))


def test_an_input_that_nothing_supplies_is_named_with_the_nearest(tmp_path, aged):
    def lost(deltas, agee):
        """Takes an input that does not exist."""

    register_merger()(lost)
    try:
        with pytest.raises(RecipeError, match=r"nothing supplies 'agee'.*did you mean 'age'"):
            Recipe.parse(
                {"base": "b", "experts": {"code": "c"}, "pipeline": ["lost"], "output": {"path": "out"}}, tmp_path
            )
    finally:
        del ENTRIES["lost"]


@pytest.fixture
def aged_and_ranked(aged):
    """A second provider beside that of `age`, and the method `aged_and_ranked_sum`, which takes the inputs of both."""

    def aged_and_ranked_sum(deltas, age, rank):
        """Adds the task vectors, each row times its age and its rank."""
        return summed(deltas * age * rank)

    ranks = RowNumbers("rank", factor=10)
    register(ranks)
    register_merger()(aged_and_ranked_sum)
    yield ranks
    del INPUTS["rank"], ENTRIES["aged_and_ranked_sum"]


def test_every_provider_opens_its_own_files(tmp_path, aged_and_ranked):
    base = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    for label, change in {"base": 0, "code": 1, "math": 2}.items():
        save(tmp_path / label, {"model.layers.0.mlp.up_proj.weight": base + change})
    content = {"base": "base", "experts": {"code": "code", "math": "math"}, "pipeline": ["aged_and_ranked_sum"]}

    merge(Recipe.parse({**content, "output": {"path": "out"}}, tmp_path))

    (merged,) = load_file(tmp_path / "out" / "model.safetensors").values()
    rows = torch.arange(ROWS, dtype=torch.float32).view(-1, 1)
    assert torch.equal(merged, base + 1 * (rows * 10 * rows) + 2 * (rows * 2 * rows * 20))
    assert aged_and_ranked.searches == 1
    manifest = json.loads((tmp_path / "out" / "merger.json").read_text())
    assert sorted(manifest["statistics"]) == ["age of code", "age of math", "rank of code", "rank of math"]
