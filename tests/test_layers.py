"""`layers`: outputs whose blocks are ranges of the models' blocks, copied, scaled, repeated or merged."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, llama, load, same_bits, save
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from merger import CheckpointError, Recipe, RecipeError, merge, plan
from merger.demo import tasks as demo_tasks
from merger.engine.manifest import Manifest
from merger.inspection import inspect, inspect_merge
from merger.outputs.lock import check_lock, lock
from merger.outputs.verify import DeepCheck, verify

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
UP = "mlp.up_proj.weight"


def config(layers, **settings):
    return {**CONFIG, "num_hidden_layers": layers, **settings}


@pytest.fixture
def models(tmp_path):
    """Two models of four and of six blocks, and their tensors."""
    tensors = {"a": llama(0, layers=4), "b": llama(1, layers=6)}
    save(tmp_path / "a", tensors["a"], config(4))
    save(tmp_path / "b", tensors["b"], config(6))
    return tensors


def recipe_of(folder, layers, **keys):
    experts = keys.pop("experts", {"b": "b"})
    return Recipe.parse({"base": "a", "experts": experts, "layers": layers, "output": "out", **keys}, folder)


def merged(folder, layers, **keys):
    merge(recipe_of(folder, layers, **keys))
    return load(folder / "out")


def block(tensors, number):
    """The tensors of a block by their names in it."""
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}


def output_config(folder):
    return json.loads((folder / "out/config.json").read_text())


def faults(folder, layers, **keys):
    with pytest.raises((RecipeError, CheckpointError)) as caught:
        plan(recipe_of(folder, layers, **keys))
    return str(caught.value).splitlines()


# --- copies -----------------------------------------------------------------------------------------


def test_copied_blocks_have_the_bits_of_their_model(models, tmp_path):
    output = merged(tmp_path, [{"model": "base", "range": [0, 3]}, {"model": "b", "range": [2, 6]}])
    expected = [("a", 0), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("b", 4), ("b", 5)]
    assert all(same_bits(block(output, i), block(models[label], n)) for i, (label, n) in enumerate(expected))
    assert block(output, 7) == {}
    assert output_config(tmp_path)["num_hidden_layers"] == 7


def test_without_a_method_the_embedding_is_the_first_model_s_and_the_head_the_last_one_s(models, tmp_path):
    output = merged(tmp_path, [{"model": "b", "range": [0, 1]}, {"model": "base", "range": [0, 1]}])
    assert same_bits(output[EMBEDDING], models["b"][EMBEDDING])
    assert same_bits({name: output[name] for name in (NORM, HEAD)}, {name: models["a"][name] for name in (NORM, HEAD)})


def test_a_model_can_be_scaled_up_without_experts(models, tmp_path):
    layers = [{"model": "base", "range": [0, 3]}, {"model": "base", "range": [1, 4]}]
    merge(Recipe.parse({"base": "a", "layers": layers, "output": "out"}, tmp_path))
    output = load(tmp_path / "out")
    assert [same_bits(block(output, i), block(models["a"], n)) for i, n in enumerate([0, 1, 2, 1, 2, 3])] == [True] * 6


def test_an_up_scaled_model_computes_what_its_blocks_in_that_order_compute(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).eval()
    model.save_pretrained(tmp_path / "a")
    layers = [{"model": "base", "range": [0, 3]}, {"model": "base", "range": [1, 4]}]
    merge(Recipe.parse({"base": "a", "layers": layers, "output": "out"}, tmp_path))
    larger = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **sizes)).eval()
    for name in ("embed_tokens", "norm"):
        getattr(larger.model, name).load_state_dict(getattr(model.model, name).state_dict())
    larger.lm_head.load_state_dict(model.lm_head.state_dict())
    for target, source in zip(larger.model.layers, [0, 1, 2, 1, 2, 3], strict=True):
        target.load_state_dict(model.model.layers[source].state_dict())
    tokens = torch.arange(12).view(2, 6)
    output = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(output(tokens).logits, larger(tokens).logits)


def test_a_scale_multiplies_the_tensors_whose_name_it_matches(models, tmp_path):
    scale = {"o_proj": 0, "mlp": [0.5, 1.5]}
    output = merged(tmp_path, [{"model": "base", "range": [0, 1]}, {"model": "b", "range": [1, 4], "scale": scale}])
    for i, factor in enumerate((0.5, 1.0, 1.5), 1):
        copied, source = block(output, i), block(models["b"], i)
        assert not copied["self_attn.o_proj.weight"].any()
        assert same_bits(copied[UP], source[UP] * factor)
        assert same_bits(copied["self_attn.q_proj.weight"], source["self_attn.q_proj.weight"])
    assert same_bits(output[EMBEDDING], models["a"][EMBEDDING])


def test_rules_are_about_merged_blocks_and_not_about_copied_ones(models, tmp_path):
    layers = [{"model": "base", "range": [0, 2]}, {"range": [2, 4]}]
    rules = [{"tensors": "up_proj", "use": "b"}]
    output = merged(tmp_path, layers, method="linear", rules=rules)
    assert same_bits(block(output, 1)[UP], block(models["a"], 1)[UP])
    assert same_bits(block(output, 3)[UP], block(models["b"], 3)[UP])


# --- merged blocks ----------------------------------------------------------------------------------


def slerp(a, b, t):
    a, b = a.double(), b.double()
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    return ((a * math.sin((1 - t) * angle) + b * math.sin(t * angle)) / math.sin(angle)).float()


def test_slerp_of_unlike_ranges_is_that_of_the_blocks_it_names(models, tmp_path):
    ranges = {"base": [0, 3], "a": [0, 3], "b": [3, 6]}
    parameters = {"t": [0.25, 0.75], "space": "weights"}
    layers = [{"model": "base", "range": [0, 1]}, {"range": ranges, "method": "slerp", "parameters": parameters}]
    output = merged(tmp_path, layers, experts={"a": "a", "b": "b"})
    for i, t in enumerate((0.25, 0.5, 0.75)):
        expected = slerp(block(models["a"], i)[UP], block(models["b"], 3 + i)[UP], t)
        torch.testing.assert_close(block(output, 1 + i)[UP], expected, rtol=1e-5, atol=1e-6)


def test_a_range_of_all_models_is_merged_by_the_recipe_s_method(models, tmp_path):
    layers = [{"range": [0, 3]}, {"range": [1, 4]}]
    output = merged(tmp_path, layers, experts={"a": "a", "b": "b"}, method="linear")
    plain = [(block(models["a"], i)[UP] + block(models["b"], i)[UP]) / 2 for i in (0, 1, 2, 1, 2, 3)]
    for i, expected in enumerate(plain):
        torch.testing.assert_close(block(output, i)[UP], expected)
    torch.testing.assert_close(output[HEAD], (models["a"][HEAD] + models["b"][HEAD]) / 2)


def test_ranges_of_the_models_own_blocks_change_no_byte(models, tmp_path):
    save(tmp_path / "c", llama(2, layers=4), config(4))
    keys = {"base": "a", "experts": {"c": "c"}, "method": "ties", "parameters": {"density": 0.5}}
    merge(Recipe.parse({**keys, "output": "plain"}, tmp_path))
    merge(Recipe.parse({**keys, "layers": [{"range": [0, 1]}, {"range": [1, 4]}], "output": "out"}, tmp_path))
    assert same_bits(load(tmp_path / "out"), load(tmp_path / "plain"))


def test_lists_of_the_recipe_go_over_the_output_and_those_of_an_entry_over_the_entry(models, tmp_path):
    layers = [
        {"range": [0, 2]},
        {"range": {"base": [0, 3], "b": [0, 3]}, "method": "sum", "parameters": {"weight": [0, 1]}},
    ]
    tensors = {
        t.name: t for t in plan(recipe_of(tmp_path, layers, method="sum", parameters={"weight": [0, 1]})).tensors
    }
    weights = [float(tensors[f"model.layers.{i}.{UP}"].stages[0].values["weight"][0]) for i in range(5)]
    assert weights == [0, 0.25, 0, 0.5, 1]


def test_an_entry_merges_the_experts_that_it_names(models, tmp_path):
    save(tmp_path / "c", llama(2, layers=4), config(4))
    layers = [
        {"range": {"base": [0, 2], "c": [2, 4]}, "method": "linear"},
        {"range": {"base": [0, 2], "b": [4, 6]}, "method": "linear"},
    ]
    output = merged(tmp_path, layers, experts={"b": "b", "c": "c"})
    assert same_bits(block(output, 0), block(load(tmp_path / "c"), 2))
    assert same_bits(block(output, 3), block(models["b"], 5))
    assert same_bits(output[EMBEDDING], load(tmp_path / "c")[EMBEDDING])
    assert same_bits(output[HEAD], models["b"][HEAD])


# --- config.json ------------------------------------------------------------------------------------

SWAPPED = [{"model": "base", "range": [0, 2]}, {"model": "b", "range": [3, 6]}]


def configured(folder, models, base, other, layers=SWAPPED):
    """The config of an output of two models with these settings in their configs."""
    save(folder / "a", models["a"], config(4, **base))
    save(folder / "b", models["b"], config(6, **other))
    return dict(plan(recipe_of(folder, layers)).config)


def test_lists_with_an_element_for_each_block_follow_the_blocks(models, tmp_path):
    base, other = {"layer_types": list("wxyz")}, {"layer_types": list("ABCDEF")}
    assert configured(tmp_path, models, base, other)["layer_types"] == list("wxDEF")


def test_a_list_that_is_as_long_by_chance_stays(models, tmp_path):
    settings = {"eos_token_id": [1, 2, 3, 4], "sizes": [1, 2, 3, 4]}
    output = configured(tmp_path, models, settings, settings)
    assert (output["eos_token_id"], output["sizes"]) == ([1, 2, 3, 4], [1, 2, 3, 4])


def test_lists_of_block_numbers_follow_the_blocks(models, tmp_path):
    output = configured(tmp_path, models, {"mlp_only_layers": [0, 2]}, {"mlp_only_layers": [3, 5]})
    assert output["mlp_only_layers"] == [0, 2, 4]


def test_the_text_part_of_a_config_is_rewritten(models, tmp_path):
    text = {"num_hidden_layers": 4, "layer_types": list("wxyz")}
    save(tmp_path / "a", models["a"], {**CONFIG, "text_config": text})
    layers = [{"model": "base", "range": [1, 3]}]
    output = plan(Recipe.parse({"base": "a", "layers": layers, "output": "out"}, tmp_path)).config
    assert output["text_config"] == {"num_hidden_layers": 2, "layer_types": ["x", "y"]}


def test_a_model_without_such_a_list_is_refused(models, tmp_path):
    with pytest.raises(CheckpointError, match=r"b: config\.json has no layer_types for each block, which base has"):
        configured(tmp_path, models, {"layer_types": list("wxyz")}, {})


def test_a_merged_block_of_another_kind_is_noted(models, tmp_path):
    save(tmp_path / "a", models["a"], config(4, layer_types=list("xxxy")))
    save(tmp_path / "b", models["b"], config(6, layer_types=list("xyxyxy")))
    notes = plan(recipe_of(tmp_path, [{"range": [0, 4]}], method="linear")).notes
    note = "b: its layer_types differs from that of the output, which is base's: 'y' instead of 'x' in block 1"
    assert note in notes


def test_a_number_that_gives_blocks_their_kind_is_rewritten_or_refused(models, tmp_path):
    dense = {"first_k_dense_replace": 1}
    layers = [{"model": "base", "range": [0, 1]}, {"model": "b", "range": [0, 3]}]
    assert configured(tmp_path, models, dense, dense, layers)["first_k_dense_replace"] == 2
    with pytest.raises(CheckpointError, match="first_k_dense_replace: 1"):
        configured(tmp_path, models, dense, dense, [layers[1], layers[0]])


def test_a_period_of_kinds_allows_moves_by_as_many_blocks(models, tmp_path):
    period = {"decoder_sparse_step": 2}
    layers = [{"model": "base", "range": [0, 4]}, {"model": "b", "range": [2, 4]}]
    assert configured(tmp_path, models, period, period, layers)["decoder_sparse_step"] == 2
    with pytest.raises(CheckpointError, match="move blocks so that each stays of its kind"):
        configured(tmp_path, models, period, period, [{"model": "b", "range": [1, 4]}])


# --- what a merge records ---------------------------------------------------------------------------

LAYERS = [{"model": "base", "range": [0, 2]}, {"range": {"base": [1, 3], "b": [3, 5]}, "method": "linear"}]


def test_the_manifest_says_which_tensors_were_read(models, tmp_path):
    merge(recipe_of(tmp_path, [*LAYERS, {"model": "b", "range": [0, 1], "scale": 0.5}]))
    manifest = Manifest.read(tmp_path / "out")
    tensors = manifest.tensors
    reads = {"base": f"model.layers.2.{UP}", "b": f"model.layers.4.{UP}"}
    assert tensors[f"model.layers.3.{UP}"]["reads"] == reads
    assert tensors[f"model.layers.3.{UP}"]["merged by"] == "layers 2"
    assert (tensors[f"model.layers.4.{UP}"]["copied from"], tensors[f"model.layers.4.{UP}"]["scale"]) == ("b", 0.5)
    assert len(manifest.recipe["layers"]) == 3


def test_blocks_in_no_entry_are_left_out_with_the_reason(models, tmp_path):
    merge_plan = plan(recipe_of(tmp_path, LAYERS))
    assert {name.split(".")[2] for name in merge_plan.dropped["b"]} == {"0", "1", "2", "5"}
    assert set(merge_plan.dropped["base"].values()) == {"no entry of `layers` has its block"}
    assert "layers: no entry has base 3; b 0-2, 5" in merge_plan.notes


def test_a_plan_shows_the_blocks_in_a_line(models, tmp_path):
    note = "layers: 4 blocks of model.layers: 0-1 copy base 0-1; 2-3 merge base 1-2, b 3-4"
    assert note in plan(recipe_of(tmp_path, LAYERS)).notes


def test_an_output_is_verified_by_merging_it_again(models, tmp_path):
    merge(recipe_of(tmp_path, LAYERS))
    assert verify(tmp_path / "out", deep=DeepCheck(sample=100)).differences == ()


def test_a_lock_holds(models, tmp_path):
    recipe = recipe_of(tmp_path, LAYERS)
    merge(recipe)
    lock(recipe, tmp_path / "recipe.lock")
    assert not check_lock(recipe, tmp_path / "recipe.lock")


def test_a_recipe_written_out_is_the_same_recipe(models, tmp_path):
    recipe = recipe_of(tmp_path, [*LAYERS, {"model": "b", "range": [0, 1], "scale": {"mlp": "1/3"}}])
    again = Recipe.parse(recipe.spelled_out(), tmp_path)
    assert again.spelled_out() == recipe.spelled_out()
    assert [layer.range for layer in again.layers] == [layer.range for layer in recipe.layers]


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "fault"),
    [
        ({"model": "c", "range": [0, 2]}, "layers 1: model: there is no expert 'c'; choose from b, base"),
        ({"model": "b"}, "layers 1: range: is missing"),
        ({"model": "b", "range": [2, 2]}, "layers 1: range: is [2, 2], expected the first block and the one after"),
        ({"model": "b", "range": [4, 2]}, "layers 1: range: is [4, 2], expected the first block and the one after"),
        ({"model": "b", "range": [-1, 2]}, "layers 1: range: is [-1, 2], expected the first block and the one after"),
        ({"model": "b", "range": [0, 7]}, "layers 1: range: [0, 7] ends behind block 5, the last one of b; write at"),
        (
            {"range": {"base": [0, 5], "b": [0, 5]}, "method": "ties"},
            "layers 1: range.base: [0, 5] ends behind block 3, the last one of base; write at most 4",
        ),
        (
            {"range": {"base": [0, 3], "b": [0, 2]}, "method": "ties"},
            "layers 1: range.b: is 2 long, but the range of base is 3 long; expected equal lengths",
        ),
        ({"range": {"b": [0, 3]}, "method": "ties"}, "layers 1: range: names no blocks of base, where task vectors"),
        ({"range": {"base": [0, 3]}, "method": "ties"}, "layers 1: range: names no expert; add blocks of b, or write"),
        ({"range": {"base": [0, 3], "d": [0, 3]}, "method": "ties"}, "layers 1: range.d: there is no expert 'd'"),
        ({"range": [0, 2]}, "layers 1: expected a `model` to copy or a method to merge by, since the recipe has no"),
        ({"range": [0, 2], "model": "b", "method": "ties"}, "layers 1: method: merges, but `model` copies the blocks"),
        ({"range": {"b": [0, 2]}, "model": "b"}, "layers 1: range: expected one range, as in [0, 24], since the"),
        ({"range": [0, 2], "scale": 2, "method": "ties"}, "layers 1: scale: is about copies; add the `model` that is"),
        ({"range": [0, 2], "model": "b", "scale": {"(": 1}}, "layers 1: scale: is not a regular expression"),
        ({"range": [0, 2], "method": "slerp"}, "layers 1: method: slerp merges exactly 2 experts, not 1"),
        ({"range": [0, 2], "method": "emr"}, "layers 1: method: emr stores several experts, and `layers` make one"),
        ({"range": [0, 2], "ranges": 1, "model": "b"}, "layers 1: ranges: unknown key; did you mean 'range'?"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_with_its_key(models, tmp_path, layer, fault):
    lines = faults(tmp_path, [layer])
    assert any(line.removeprefix("recipe: ").startswith(fault) for line in lines), lines


def test_an_embedding_and_a_head_of_other_lengths_are_refused(models, tmp_path):
    save(tmp_path / "b", llama(1, layers=6, rows=10), config(6, vocab_size=10))
    layers = [{"model": "b", "range": [0, 2]}, {"model": "base", "range": [2, 4]}]
    assert faults(tmp_path, layers) == [
        "lm_head.weight has 8 rows of base; model.embed_tokens.weight has 10 rows of b; take all of them from one, as "
        "by the first rule {kinds: [embedding, tied, head], use: base}"
    ]
    rules = [{"kinds": ["embedding", "tied", "head"], "use": "b"}]
    assert plan(recipe_of(tmp_path, layers, rules=rules)).config["vocab_size"] == 10


def test_a_fault_names_the_line(models, tmp_path):
    layers = "layers:\n  - {model: base, range: [0, 4]}\n  - {model: b, range: [4, 9]}\n"
    text = f"base: a\nexperts: {{b: b}}\n{layers}output: out\n"
    with pytest.raises(CheckpointError, match=r"^recipe:5: layers 2: range: \[4, 9\] ends behind block 5"):
        plan(Recipe.parse(text, tmp_path))


def test_an_entry_of_some_experts_needs_a_method_of_its_own(models, tmp_path):
    experts = {"b": "b", "c": "b"}
    lines = faults(tmp_path, [{"range": {"base": [0, 2], "b": [0, 2]}}], experts=experts, method="linear")
    expected = "layers 1: range: names no blocks of c, which the recipe's method merges; add them, or a method"
    assert lines[0].endswith(expected)


@pytest.mark.parametrize("method", ["regmean_pp", "featcal", "distill"])
def test_methods_behind_merged_blocks_are_refused(models, tmp_path, method):
    calibration = {"data": {"b": "b.jsonl"}}
    lines = faults(tmp_path, [{"range": [0, 2]}], method=method, calibration=calibration)
    assert "behind the merged blocks, whose order `layers` change for each expert" in lines[0]


def test_gram_matrices_of_unlike_blocks_are_refused(models, tmp_path):
    layers = [{"range": {"base": [0, 2], "b": [0, 2], "c": [2, 4]}}]
    keys = {"experts": {"b": "b", "c": "b"}, "method": "regmean", "calibration": {"data": "text.jsonl"}}
    assert "takes blocks of other numbers from each expert, but gram is made" in faults(tmp_path, layers, **keys)[0]


def test_a_model_without_numbered_blocks_is_refused(models, tmp_path):
    outside = {name: values for name, values in models["b"].items() if ".layers." not in name}
    save(tmp_path / "b", outside, config(6))
    lines = faults(tmp_path, [{"model": "b", "range": [0, 2]}])
    assert lines[0].endswith("layers 1: range: b has no blocks model.layers.N, as base has")
    save(tmp_path / "a", outside, config(4))
    lines = faults(tmp_path, [{"model": "base", "range": [0, 2]}])
    assert "base: config.json says that there are 4 blocks" in lines[0]


def test_without_layers_a_recipe_needs_experts(tmp_path):
    with pytest.raises(RecipeError, match="experts: is missing"):
        Recipe.parse("base: a\nmethod: ties\noutput: out", tmp_path)


# --- text -------------------------------------------------------------------------------------------

EXPERTS = ("upper", "shift")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A recipe's keys for two of the demo's models, with text of each."""
    folder = tmp_path_factory.mktemp("demo")
    for task in EXPERTS:
        lines = (json.dumps({"text": p + a}) for p, a in demo_tasks.examples(task, "calibration", 8))
        (folder / f"{task}.jsonl").write_text("\n".join(lines))
    models = Path(demo_tasks.__file__).parent / "models"
    calibration = {"data": {task: str(folder / f"{task}.jsonl") for task in EXPERTS}}
    return {
        "base": str(models / "base"),
        "experts": {task: str(models / task) for task in EXPERTS},
        "calibration": calibration,
    }


WANDA = {"pipeline": [{"wanda": {"density": 0.5}}, "mean"]}


@pytest.mark.parametrize("method", [WANDA, {"method": "regmean"}], ids=["statistics", "grams"])
def test_a_repeated_block_is_judged_by_the_inputs_of_the_experts_block(demo, tmp_path, method):
    merge(Recipe.parse({**demo, **method, "output": "plain"}, tmp_path))
    layers = [{"range": [0, 2]}, {"range": [1, 2]}, {"model": "upper", "range": [0, 1]}]
    merge(Recipe.parse({**demo, **method, "layers": layers, "output": "out"}, tmp_path))
    plain, output = load(tmp_path / "plain"), load(tmp_path / "out")
    assert [same_bits(block(output, i), block(plain, n)) for i, n in enumerate([0, 1, 1])] == [True] * 3


def test_an_entry_of_one_expert_is_merged_by_the_inputs_of_the_block_it_names(demo, tmp_path):
    layers = [{"range": [0, 1]}, {"range": {"base": [0, 1], "shift": [1, 2]}, "method": "regmean"}]
    merge(Recipe.parse({**demo, "method": "regmean", "layers": layers, "output": "out"}, tmp_path))
    shift = load(demo["experts"]["shift"])
    torch.testing.assert_close(block(load(tmp_path / "out"), 1)[UP], block(shift, 1)[UP], atol=1e-2, rtol=1e-2)


# --- what other commands do with it -----------------------------------------------------------------


def test_an_inspection_of_the_recipe_counts_the_blocks_that_all_experts_have(models, tmp_path):
    layers = [{"range": [0, 1]}, {"model": "b", "range": [3, 5]}, {"range": [2, 3]}]
    inspection = inspect(recipe_of(tmp_path, layers, method="linear"))
    blocks = [name for name in inspection.views[0].layers if ".layers." in name]
    assert blocks == ["model.layers.0", "model.layers.3"]


def test_an_inspection_of_the_output_says_why_it_compares_no_weights(models, tmp_path):
    merge(recipe_of(tmp_path, LAYERS))
    notes = inspect_merge(tmp_path / "out").notes
    assert notes == [
        "its blocks have other numbers in its inputs (`layers`), so shares cannot be told from the weights"
    ]
