"""Checkpoints of one training run as the experts of a recipe."""

import math

import pytest
import torch
from checkpoints import llama, load, save
from jsonschema import Draft202012Validator

import merger
from merger.engine.memory import MemoryNeed
from merger.errors import RecipeError
from merger.recipe.json_schema import json_schema
from merger.recipe.trajectory import Trajectory


def write_run(folder, steps, **sizes):
    for step in steps:
        save(folder / "ckpts" / f"step-{step}", llama(step, **sizes))


def recipe(folder, experts, **options):
    content = {"experts": experts, "method": "linear", "output": {"path": "out", "dtype": "float32"}, **options}
    return merger.Recipe.parse(content, folder=folder)


@pytest.mark.parametrize(
    ("scheme", "shares"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("linear", [1, 2, 3, 4]),
        ("minus_sqrt", [1 / 2, math.sqrt(2 / 4) - 1 / 2, math.sqrt(3 / 4) - math.sqrt(2 / 4), 1 - math.sqrt(3 / 4)]),
        ("cosine", [0.5 - math.sqrt(2) / 4, math.sqrt(2) / 4, math.sqrt(2) / 4, 0.5 - math.sqrt(2) / 4]),
        ({"ema": 0.5}, [0.125, 0.125, 0.25, 0.5]),
    ],
)
def test_what_each_checkpoint_counts(scheme, shares):
    found = Trajectory.model_validate({"glob": "*", "weights": scheme}).shares(4)
    assert found == pytest.approx(shares)


def test_a_uniform_mean_is_a_linear_decay_of_the_learning_rate():
    updates, count = [3.0, -1.0, 4.0], 4  # what the steps after the first checkpoint added
    checkpoints = [sum(updates[:j]) for j in range(count)]
    decayed = sum((1 - i / count) * update for i, update in enumerate(updates, 1))
    shares = Trajectory(glob="*").shares(count)
    assert sum(s * c for s, c in zip(shares, checkpoints, strict=True)) / sum(shares) == pytest.approx(decayed)


def test_checkpoints_are_merged_in_natural_order_and_the_last_is_the_base(tmp_path):
    write_run(tmp_path, [10, 2, 300])
    loaded = recipe(tmp_path, {"glob": "ckpts/step-*", "weights": "linear"})
    assert list(loaded.experts) == ["step-2", "step-10", "step-300"]
    assert loaded.base.model == "ckpts/step-300"
    merger.merge(loaded)
    early, middle, late = (load(tmp_path / "ckpts" / f"step-{step}") for step in (2, 10, 300))
    for name, values in load(tmp_path / "out").items():
        torch.testing.assert_close(values, (early[name] + 2 * middle[name] + 3 * late[name]) / 6, rtol=0, atol=1e-6)


def test_a_base_that_is_named_stays(tmp_path):
    write_run(tmp_path, [1, 2])
    save(tmp_path / "start", llama(9))
    loaded = recipe(tmp_path, {"glob": str(tmp_path / "ckpts" / "*")}, base="start")
    assert loaded.base.model == "start"
    assert [expert.model for expert in loaded.experts.values()] == [str(tmp_path / f"ckpts/step-{s}") for s in (1, 2)]


def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path):
    write_run(tmp_path, range(40), rows=1 << 14, hidden=64, layers=1)
    needs = [
        MemoryNeed.of(merger.plan(recipe(tmp_path, {"glob": pattern}))).bytes(2)
        for pattern in ("ckpts/step-[0-7]", "ckpts/*")
    ]
    assert needs[1] < 1.05 * needs[0]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"glob": "ckpt/step-*"}, "recipe: experts.glob: no folder matches ckpt/step-*; {0}/ckpt has no folders"),
        (
            {"glob": "ckpts/stop-*"},
            "recipe: experts.glob: no folder matches ckpts/stop-*; in {0}/ckpts did you mean 'step-1'?",
        ),
        ({"glob": "ckpts/*", "weights": {"ema": 2}}, "recipe: experts.weights.ema: is 2, expected less than 1.0"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_told(tmp_path, experts, message):
    write_run(tmp_path, [1])
    with pytest.raises(RecipeError) as refused:
        recipe(tmp_path, experts)
    assert str(refused.value) == message.format(tmp_path)


def test_a_scheme_that_there_is_not_is_told_with_those_that_there_are(tmp_path):
    write_run(tmp_path, [1])
    with pytest.raises(RecipeError) as refused:
        recipe(tmp_path, {"glob": "ckpts/*", "weights": "linar"})
    schemes = "'uniform', 'minus_sqrt', 'cosine' or 'linear'"
    assert str(refused.value) == (f"recipe: experts.weights: is 'linar', expected {schemes}; did you mean 'linear'?")


def test_the_schema_for_editors_takes_a_pattern_without_a_base():
    validator = Draft202012Validator(json_schema())
    content = {"experts": {"glob": "ckpts/*", "weights": {"ema": 0.9}}, "method": "linear", "output": "out"}
    assert validator.is_valid(content)
    assert not validator.is_valid({**content, "experts": {"code": "models/code"}})
