"""The sentences that open an inspection are true: each figure in them is the inspection's, in every edge case."""

import pytest
import torch
from checkpoints import CONFIG, save

import merger as library
from merger import Recipe
from merger.inspection.findings import findings, opening
from merger.inspection.html import page

BLOCKS = {**CONFIG, "num_hidden_layers": 2}
BASE = [1.0, 2, 3, 4, 5, 6, 7, 8]
NAMES = ("model.layers.0.a.weight", "model.layers.1.a.weight")


def write(folder, **changes):
    """Writes the base and experts that add these changes to the eight weights of each of two layers."""
    for name, layers in {"base": [[0] * 8] * 2, **changes}.items():
        rows = [torch.tensor(BASE) + torch.tensor(layer, dtype=torch.float32) for layer in layers]
        save(folder / name, {tensor: row.reshape(2, 4) for tensor, row in zip(NAMES, rows, strict=True)}, BLOCKS)


def inspect(folder, method="linear", **settings):
    """The inspection of a recipe with all experts in the folder."""
    experts = sorted(path.name for path in folder.iterdir() if path.name not in ("base", "out"))
    recipe = {"base": "base", "experts": {name: name for name in experts}, "method": method, "output": {"path": "out"}}
    return library.inspect(Recipe.parse({**recipe, **settings}, folder))


def test_overlap_and_conflict_name_the_pair_the_share_what_chance_gives_and_the_layer(tmp_path):
    write(
        tmp_path,
        code=[[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]],
        math=[[1, 1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]],
    )
    overlap, conflict, _ = findings(inspect(tmp_path))
    assert overlap == (
        "The experts overlap most in math and code: 75.0 % of the weights that math changes, code changes too; random "
        "positions would share 37.5 %. Most in model.layers.0 (100.0 %)."
    )
    assert conflict == (
        "The experts conflict most in code and math: they pull 33.3 % of the weights that both change in opposite "
        "directions; random signs would pull 50 %. Most in model.layers.0 (33.3 %)."
    )


def test_experts_apart_neither_overlap_nor_conflict(tmp_path):
    write(tmp_path, code=[[1, 0, 0, 0, 0, 0, 0, 0]] * 2, math=[[0, 1, 0, 0, 0, 0, 0, 0]] * 2)
    assert findings(inspect(tmp_path))[:2] == [
        "No weight is changed by two experts.",
        "No weight is pulled in opposite directions, since no two experts change the same.",
    ]


def test_experts_that_agree_do_not_conflict(tmp_path):
    write(tmp_path, code=[[1, 2, 0, 0, 0, 0, 0, 0]] * 2, math=[[3, 0, 0, 0, 0, 0, 0, 0]] * 2)
    assert findings(inspect(tmp_path))[1] == "No two experts pull a weight in opposite directions."


def test_layers_that_are_alike_are_not_named(tmp_path):
    write(tmp_path, code=[[1, 2, 0, 0, 0, 0, 0, 0]] * 2, math=[[3, 0, 0, 0, 0, 0, 0, 0]] * 2)
    assert findings(inspect(tmp_path))[0].endswith("random positions would share 25.0 %.")


def test_a_layer_of_a_few_weights_is_not_named(tmp_path):
    sizes = {"model.layers.0.a.weight": 300, "model.layers.1.a.weight": 300, "model.norm.weight": 2}
    for name, changed in {"base": 0, "code": 150, "math": 75}.items():
        tensors = {tensor: torch.ones(size) for tensor, size in sizes.items()}
        tensors["model.layers.0.a.weight"][:changed] += 1
        tensors["model.layers.1.a.weight"][: changed // 3] += 1
        tensors["model.norm.weight"] += changed
        save(tmp_path / name, {tensor: weights.reshape(2, -1) for tensor, weights in tensors.items()}, CONFIG)
    overlap, *_ = findings(inspect(tmp_path))
    assert "norm" not in overlap


def test_what_is_in_the_merge_is_a_share_of_each_input(tmp_path):
    write(tmp_path, code=[[4, 4, 0, 0, 0, 0, 0, 0]] * 2, math=[[0, 0, 4, 0, 0, 0, 0, 0]] * 2)
    assert findings(inspect(tmp_path, "task_arithmetic"))[2] == (
        "Of all weights the merge takes the exact values of code 25.0 %, math 12.5 %, and of the base 62.5 %; 0.0 % "
        "are at no single input's value."
    )


def test_of_a_mixture_the_cosines_are_told(tmp_path):
    write(tmp_path, code=[[4] * 8] * 2, math=[[1] * 8] * 2)
    inspection = inspect(tmp_path)
    assert inspection.view("result").whole.blend == 1
    assert findings(inspection)[2] == (
        "The merge mixes the inputs in 100.0 % of all weights; the cosines of its change with the experts' are: code "
        "+1.000, math +1.000."
    )


def test_of_one_expert_its_layers_are_told(tmp_path):
    write(tmp_path, code=[[4] * 8, [1, 0, 0, 0, 0, 0, 0, 0]])
    expected = "code changes 56.2 % of all weights: most in model.layers.0 (100.0 %), least in model.layers.1 (12.5 %)."
    assert findings(library.inspect_model(str(tmp_path / "code"), str(tmp_path / "base"))) == [expected]
    assert findings(inspect(tmp_path))[0] == expected


def test_an_expert_that_changes_nothing_is_told_so(tmp_path):
    write(tmp_path, code=[[0] * 8] * 2)
    inspection = library.inspect_model(str(tmp_path / "code"), str(tmp_path / "base"))
    assert findings(inspection) == ["code changes 0.0 % of all weights."]


def test_the_page_opens_with_what_how_and_into_what(tmp_path):
    write(tmp_path, code=[[4, 4, 0, 0, 0, 0, 0, 0]] * 2, math=[[0, 0, 4, 0, 0, 0, 0, 0]] * 2)
    rules = [{"tensors": "layers.1", "method": "ties", "parameters": {"density": 0.5}}]
    inspection = inspect(tmp_path, rules=rules)
    expected = (
        "linear, with 1 rule for some tensors, would merge code (code), math (math), fine-tunes of base, into out."
    )
    assert opening(inspection) == expected
    assert page(inspection).index(expected) < page(inspection).index("<li>")


def test_a_finished_merge_opens_with_its_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, code=[[4, 4, 0, 0, 0, 0, 0, 0]] * 2)
    recipe = {"base": "base", "experts": {"code": "code"}, "pipeline": ["top", "sum"], "output": {"path": "out"}}
    library.merge(Recipe.parse({**recipe, "pipeline": [{"top": {"density": 0.5}}, "sum"]}, tmp_path))
    inspection = library.inspect_merge("out")
    assert opening(inspection) == "top+sum merged code (code), a fine-tune of base, into out."
    assert inspection.as_json()["merge"]["inputs"] == {"base": "base", "code": "code"}


def test_a_fine_tune_is_compared_with_its_base(tmp_path):
    write(tmp_path, code=[[4] * 8] * 2)
    base = str(tmp_path / "base")
    inspection = library.inspect_model(str(tmp_path / "code"), base)
    assert opening(inspection) == f"code compared with its base {base}."
    assert inspection.merge is None


@pytest.mark.parametrize("method", ["regmean", "featcal"])
def test_a_method_that_looks_behind_merged_blocks_is_named_though_its_stages_are_not_shown(method):
    from merger.inspection.merge_facts import facts_of_recipe

    recipe = {
        "base": "base",
        "experts": {"code": {"model": "base", "adapter": "lora"}},
        "method": method,
        "calibration": {"data": {"code": "code.jsonl"}},
        "output": {"path": "out"},
    }
    facts = facts_of_recipe(Recipe.parse(recipe))
    assert (facts.method, facts.inputs) == (method, {"base": "base", "code": "lora"})


@pytest.mark.parametrize("experts", [{}, {"b": "code"}])
def test_a_recipe_of_layers_alone_has_an_opening_and_no_sentences_on_what_is_not_compared(tmp_path, experts):
    write(tmp_path, code=[[4] * 8] * 2)
    layers = [{"model": "base", "range": [0, 2]}, {"model": "b" if experts else "base", "range": [0, 2]}]
    recipe = {"base": "base", "experts": experts, "layers": layers, "output": {"path": "out"}}
    library.merge(Recipe.parse(recipe, tmp_path))
    inspection = library.inspect_merge(tmp_path / "out")
    merged = "b (code), a fine-tune of base" if experts else "base alone"
    assert opening(inspection) == f"layers merged {merged}, into {tmp_path / 'out'}."
    assert findings(inspection) == []
    if experts:
        assert opening(library.inspect(Recipe.parse(recipe, tmp_path))).startswith("layers would merge b (code)")
