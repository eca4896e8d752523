"""All faults of a recipe come together, whichever sections they are in."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import llama, save

from merger.errors import RecipeError
from merger.recipe.recipe import Recipe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base and two experts; the current folder."""
    for seed, name in enumerate(("base", "code", "french")):
        save(tmp_path / "models" / name, llama(seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(merger, text, command="plan"):
    """The lines of a command's refusal of a recipe."""
    Path("recipe.yaml").write_text(text)
    ran = merger(command, "recipe.yaml")
    assert (ran.code, ran.out) == (2, "")
    return [line.removeprefix("error: ") for line in ran.err.splitlines()]


RECIPE = """\
base: models/bse
experts:
  code: models/code
  french: {model: models/french, weight: heavy}
method: linear
parameters: {weight: {cod: 1, french: 1}, normalise: true}
tokenizer: unoin
calibration:
  data: {frensh: data/french.jsonl}
  samples: 0
tokens: {<pad>: {from: frnch}}
rules:
  - {kinds: [expert3], use: base}
output: models/code/out
"""


def test_misspelt_experts_and_the_place_of_the_output_come_with_all_other_faults(merger, folder):
    assert refusal(merger, RECIPE) == [
        "recipe.yaml:1: base: there is no folder models/bse; did you mean models/base?",
        "recipe.yaml:4: experts.french.weight: expected a number or a fraction such as 1/3, not 'heavy'",
        "recipe.yaml:6: parameters.normalise: unknown key; did you mean 'normalize'?",
        "recipe.yaml:6: parameters.weight: there is no expert 'cod'; did you mean 'code'?",
        "recipe.yaml:7: tokenizer: there is no expert 'unoin'; did you mean 'union'?",
        "recipe.yaml:9: calibration.data.frensh: there is no such expert; did you mean 'french'?",
        "recipe.yaml:9: calibration.data.frensh: there is no file data/french.jsonl",
        "recipe.yaml:10: calibration.samples: is 0, expected at least 1",
        "recipe.yaml:11: tokens.<pad>.from: there is no expert 'frnch'; did you mean 'french'?",
        "recipe.yaml:13: rule 1 (kinds: expert3): kinds 1: is 'expert3', expected 'linear', 'conv1d', 'head', 'tied', "
        "'embedding', 'vector', 'expert3d', 'other' or 'buffer'; did you mean 'expert3d'?",
        f"recipe.yaml:14: output.path: {folder}/models/code/out is, holds or lies in the input {folder}/models/code; "
        "choose another folder",
    ]


@pytest.mark.parametrize("command", ["plan", "run"])
def test_an_output_in_an_input_comes_with_the_inputs_that_are_missing(merger, folder, command):
    text = "base: models/bse\nexperts: {code: models/code}\nmethod: linear\noutput: models/code\n"
    assert refusal(merger, text, command) == [
        "recipe.yaml:1: base: there is no folder models/bse; did you mean models/base?",
        f"recipe.yaml:4: output.path: {folder}/models/code is, holds or lies in the input {folder}/models/code; "
        "choose another folder",
    ]


def test_an_occupied_output_comes_with_the_inputs_that_are_missing(merger, folder):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    text = "base: models/bse\nexperts: {code: models/cod}\nmethod: linear\noutput: out\n"
    assert refusal(merger, text, "run") == [
        "recipe.yaml:1: base: there is no folder models/bse; did you mean models/base?",
        "recipe.yaml:2: experts.code: there is no folder models/cod; did you mean models/code?",
        f"recipe.yaml:4: output.path: {folder}/out is there already; choose another folder, or replace it with --force",
    ]


LINEAR = {"base": "base", "experts": ["models/code", "models/french"], "method": "linear", "output": "out"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("weight", "did you mean 'parameters.weight'?"),
        ("wieght", "did you mean 'parameters.weight'?"),
        ("dtype", "did you mean 'output.dtype' or 'evaluation.dtype'?"),
        ("methd", "did you mean 'method'?"),
    ],
)
def test_a_key_of_a_section_is_offered_where_it_stands_beside_it(key, message):
    with pytest.raises(RecipeError) as refused:
        Recipe.parse({**LINEAR, key: 1})
    assert str(refused.value) == f"recipe: {key}: unknown key; {message}"


@pytest.mark.parametrize("empty", ["parameters", "rules", "layers", "tokens"])
def test_a_key_with_nothing_below_means_its_default(empty):
    assert Recipe.parse({**LINEAR, empty: None}).spelled_out() == Recipe.parse(LINEAR).spelled_out()


def test_an_empty_parameter_is_no_number():
    with pytest.raises(RecipeError) as refused:
        Recipe.parse({**LINEAR, "parameters": {"weight": None}})
    assert str(refused.value) == "recipe: parameters.weight: is empty, expected a number"


def test_a_rule_is_named_alike_in_faults_and_in_notes(merger, folder):
    rules = "rules: [{tensors: norm, use: base}, {kinds: [expert3d, conv1d], use: base}]\n"
    text = f"base: models/base\nexperts: [models/code]\nmethod: linear\n{rules}output: out\n"
    Path("recipe.yaml").write_text(text)
    assert "rule 2 (kinds: expert3d, conv1d) matches no tensor" in " ".join(merger("plan", "recipe.yaml").out.split())
    assert refusal(merger, text.replace("conv1d], use: base", "conv1d], use: bse")) == [
        "recipe.yaml:4: rule 2 (kinds: expert3d, conv1d): use: there is no expert 'bse'; did you mean 'base'?"
    ]


def test_all_inputs_that_cannot_be_opened_are_told_together(merger, folder):
    (folder / "models/code/config.json").write_text("{")
    (folder / "models/french/model.safetensors").write_bytes(b"")
    Path("recipe.yaml").write_text(
        "base: models/base\nexperts: [models/code, models/french]\nmethod: linear\noutput: out\n"
    )
    ran = merger("plan", "recipe.yaml")
    assert ran.code == 3
    code, french = ran.err.splitlines()
    assert code.startswith("error: code: ")
    assert french.startswith(f"error: {folder}/models/french/model.safetensors: ")
