"""`merger inspect` of a finished merge and of one fine-tune."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import llama, load, save, trio

import merger as library
from merger.engine.recorded_recipe import expert_name, recipe_folder
from merger.errors import CheckpointError

RECIPE = """\
base: models/base
experts: {code: models/code, math: models/math}
method: im
parameters: {density: 0.3}
rules: [{tensors: norm, use: base}, {tensors: lm_head, use: math}]
output: {path: out/merged}
"""
MERGED = "out/merged"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a finished merge; the current one."""
    monkeypatch.chdir(tmp_path)
    trio(tmp_path / "models", dtype=torch.bfloat16)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    library.merge(library.Recipe.load("recipe.yaml"))
    return tmp_path


def shares(names, of=MERGED, labels=("base", "code", "math")):
    """Where the values of some tensors of a merge come from, by a loop over all of them."""
    merged, *inputs = (load(path) for path in (of, *(f"models/{label}" for label in labels)))
    ends = dict.fromkeys((*labels, "blend"), 0)
    for name in names:
        for i, value in enumerate(merged[name].flatten().tolist()):
            matches = (
                label
                for label, tensors in zip(labels, inputs, strict=True)
                if tensors[name].flatten()[i].item() == value
            )
            ends[next(matches, "blend")] += 1
    size = sum(ends.values())
    return [count / size for count in ends.values()]


def said(facts):
    return [facts.at_base, *facts.at_expert.values(), facts.blend]


# --- a finished merge -----------------------------------------------------------------------------


def test_a_merges_shares_are_told_from_its_weights(folder):
    inspection = library.inspect_merge(folder / MERGED)
    merged = [name for name in load(MERGED) if "norm" not in name and "lm_head" not in name]
    layer = [name for name in merged if name.startswith("model.layers.1.")]
    result = inspection.view("result")
    assert said(result.layers["model.layers.1"]) == pytest.approx(shares(layer))
    assert said(result.whole) == pytest.approx(shares(merged))
    assert result.whole.blend == 0


def test_a_merges_task_vectors_are_those_of_its_experts(folder):
    inspection = library.inspect_merge(folder / MERGED)
    forecast = library.inspect(library.Recipe.load("recipe.yaml"))
    assert inspection.view("task_vectors") == forecast.view("task_vectors")
    assert inspection.experts == ["code", "math"]


@pytest.mark.parametrize("method", ["linear", "ties", "im", "della", "slerp"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_recipe_foretells_where_the_positions_of_its_merge_end(folder, method, dtype):
    recipe = library.Recipe.load(
        "recipe.yaml", [f"method={method}", "parameters={}", f"output.dtype={dtype}", "output.path=foretold"]
    )
    forecast = library.inspect(recipe).view("result")
    library.merge(recipe)
    outcome = library.inspect_merge(folder / "foretold").view("result")
    assert {name: said(facts) for name, facts in forecast.tensors.items()} == {
        name: said(facts) for name, facts in outcome.tensors.items()
    }


def test_what_a_merge_copied_is_named(folder):
    inspection = library.inspect_merge(folder / MERGED)
    assert inspection.copied["lm_head.weight"] == "math"
    assert inspection.copied["model.norm.weight"] == "base"
    assert inspection.made["method"] == "im"
    assert inspection.made["tensors"] == {"copied from math": 1, "merged by recipe": 15, "copied from base": 5}


def test_a_value_that_was_changed_by_hand_is_a_blend(folder):
    tensors = load(MERGED)
    tensors["model.embed_tokens.weight"][0] = 7
    save(folder / MERGED, tensors)
    facts = library.inspect_merge(folder / MERGED).view("result").tensors["model.embed_tokens.weight"]
    assert facts.blend == 4 / 32


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_inputs_are_rounded_as_the_merge_was_before_they_are_compared(folder, dtype):
    for label in ("base", "code", "math"):
        tensors = {name: values.float() * 1.0001 for name, values in load(f"models/{label}").items()}
        save(folder / "models" / label, tensors)
    library.merge(library.Recipe.load("recipe.yaml", [f"output.dtype={dtype}", "output.path=rounded"]))
    assert library.inspect_merge(folder / "rounded").view("result").whole.blend == 0


def test_a_merge_that_was_moved_with_its_inputs_is_found(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.move(folder / "out", elsewhere / "out")
    shutil.move(folder / "models", elsewhere / "models")
    assert library.inspect_merge(elsewhere / MERGED).views


def test_inputs_elsewhere_are_pointed_at(merger, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(folder / "models", elsewhere / "models")
    ran = merger("inspect", MERGED, "--inputs", elsewhere, "--json")
    assert [view["name"] for view in json.loads(ran.out)["views"]] == ["task_vectors", "result"]


def test_without_its_inputs_a_merge_is_told_from_its_manifest(merger, folder):
    shutil.rmtree(folder / "models")
    ran = merger("inspect", MERGED)
    assert ran.code == 0
    assert "im by merger" in ran.out
    assert "code: models/code" in ran.out
    assert ran.err == (
        f"note: shares cannot be told from the weights: base: there is no folder {folder}/models/base; "
        "--inputs says where they are\n"
    )


def test_an_input_that_is_another_by_now_is_not_compared(merger, folder):
    save(folder / "models" / "math", llama(9, dtype=torch.bfloat16))
    ran = merger("inspect", MERGED, "--json")
    note = json.loads(ran.out)["notes"][0]
    assert note.startswith(f"math: {folder}/models/math/model.safetensors is not the file that was merged")
    assert json.loads(ran.out)["views"] == []


def test_a_condition_that_cannot_be_told_does_not_pass(merger, folder):
    shutil.rmtree(folder / "models")
    ran = merger("inspect", MERGED, "--quiet", "--fail-if", "blend > 0.1")
    assert ran.code == 3
    assert ran.err.startswith("error: --fail-if 'blend > 0.1' cannot be told: shares cannot be told from the weights")


def test_a_merge_is_shown_by_what_each_input_gave_to_each_layer(merger, folder):
    ran = merger("inspect", MERGED)
    rows = [line.split() for line in ran.out.splitlines()]
    heading = next(row for row in rows if row[:2] == ["layer", "(result)"])
    assert heading[2:] == ["blend", "base", "code", "math"]
    assert any(row[:1] == ["layers.0"] for row in rows)
    assert "6 tensors are copied, and not counted" in ran.out


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "cannot be read: "),
        ("[]", "is not of format 1, "),
        ('{"format": 99}', "is not of format 1, "),
        ('{"format": 1, "recipe": {}}', "lacks versions, seed, "),
    ],
)
def test_a_manifest_that_is_none_is_refused(folder, content, reason):
    (folder / MERGED / "merger.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"merger\.json: {reason}"):
        library.inspect_merge(folder / MERGED)


@pytest.mark.parametrize("subject", [(MERGED,), ("models/code", "--base", "models/base")], ids=["merge", "fine-tune"])
@pytest.mark.parametrize(
    ("device", "code", "reason"),
    [("gpu", 2, "expected auto, cpu, cuda or cuda:0"), ("cuda:99", 4, "this machine has ")],
)
def test_a_device_that_is_none_is_refused(merger, folder, subject, device, code, reason):
    ran = merger("inspect", *subject, "--device", device)
    assert ran.code == code
    assert ran.err.startswith(f"error: --device {device}: {reason}")


def test_a_folder_without_a_manifest_asks_for_its_base(merger, folder):
    ran = merger("inspect", "models/code")
    assert ran.code == 3
    assert ran.err == "error: models/code: holds no merger.json, so it is no merge; give --base for a fine-tune\n"


def test_only_a_recipe_can_be_overridden(merger, folder):
    ran = merger("inspect", MERGED, "--set", "seed=1")
    assert (ran.code, ran.err) == (2, f"error: --set changes a recipe, and {MERGED} is none\n")


def test_an_expert_may_be_called_merged(folder):
    (folder / "recipe.yaml").write_text(RECIPE.replace("code: models/code", "merged: models/code"))
    library.merge(library.Recipe.load("recipe.yaml", ["output.path=again"]))
    inspection = library.inspect_merge(folder / "again")
    assert list(inspection.view("result").whole.at_expert) == ["merged", "math"]


# --- one fine-tune --------------------------------------------------------------------------------


def test_a_fine_tune_is_seen_where_it_changed_its_base(folder):
    base = load("models/base")
    touched = "model.layers.1.mlp.up_proj.weight"
    save(folder / "tune", {**base, touched: base[touched] + 1})
    view = library.inspect_model("tune", "models/base").view("task_vectors")
    assert {name for name, facts in view.tensors.items() if facts.density["tune"]} == {touched}
    change = (base[touched] + 1).float() - base[touched].float()
    assert view.whole.norm["tune"] == pytest.approx(change.norm().item())


def test_a_fine_tune_is_shown_with_the_layer_that_changed_most_first(merger, folder):
    base = load("models/base")
    touched = "model.layers.1.mlp.up_proj.weight"
    save(folder / "tune", {**base, touched: base[touched] + 1})
    ran = merger("inspect", "tune", "--base", "models/base")
    lines = ran.out.splitlines()
    row = next(i for i, line in enumerate(lines) if "layer (task_vectors)" in line) + 2
    assert lines[row].split()[0] == "model.layers.1"
    assert "A, B" not in ran.out


def test_a_question_about_pairs_has_no_offender_in_one_fine_tune(merger, folder):
    ran = merger("inspect", "models/code", "--base", "models/base", "--fail-if", "overlap > 0")
    assert ran.code == 0


def test_a_fine_tune_has_no_result_to_judge(merger, folder):
    ran = merger("inspect", "models/code", "--base", "models/base", "--fail-if", "blend > 0")
    assert ran.code == 3
    assert ran.err == "error: --fail-if 'blend > 0' cannot be told: a model has no result to look at\n"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/My-Model_1.5@main", "My-Model_1.5"),
        ("/folder/tune/", "tune"),
        ("..", "model"),
        ("a/base", "base_"),
        ("-x y!", "xy"),
    ],
)
def test_a_model_is_called_by_the_last_part_of_its_name(source, name):
    assert expert_name(source) == name
    library.Recipe.parse({"base": "b", "experts": {name: "x"}, "method": "linear", "output": {"path": "o"}})


@pytest.mark.parametrize(
    ("output", "folder", "start"),
    [
        ("out/merged", "/w/out/merged", "/w"),
        ("./out", "/w/out", "/w"),
        ("out", "/w/renamed", None),
        ("../out", "/w/out", None),
    ],
)
def test_a_recipe_lay_where_its_output_path_starts(output, folder, start):
    assert recipe_folder(Path(folder), output) == (start and Path(start))
