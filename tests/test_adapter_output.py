"""A merge that is written as an adapter: against peft, the same merge as a model, and the SVD of its change."""

import json
import shutil

import numpy
import pytest
import torch
from checkpoints import load
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import merger
import merger.engine.merge
from merger.checkpoint.adapter_config import lora_config
from merger.errors import RecipeError
from merger.outputs.lock import check_lock, is_done, lock

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LLAMA = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=False)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, eos_token_id=0)),
}
TARGETS = {"llama": ["q_proj", "down_proj"], "tied": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
ADAPTER, NORM = {"path": "out", "form": "adapter"}, "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapters_by_kind(tmp_path_factory):
    """A base of each kind, with an adapter `code` of rank 2 and an adapter `math` of rank 3 on it."""
    folders = {}
    for kind, make in MODELS.items():
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        make().save_pretrained(folder / "base")
        for rank, name in ((2, "code"), (3, "math")):
            settings = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
            model = get_peft_model(base_model(folder, kind), LoraConfig(r=rank, lora_alpha=8, **settings))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(folder / name)
    return folders


@pytest.fixture(scope="module")
def stored_fine_tunes(tmp_path_factory):
    """A base and two fine-tunes of it, `code` and `math`, whose every tensor is changed."""
    folder = tmp_path_factory.mktemp("fine-tunes")
    torch.manual_seed(0)
    model = MODELS["llama"]()
    model.save_pretrained(folder / "base")
    for name in ("code", "math"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def adapters(adapters_by_kind, tmp_path):
    """A copy of the base of a kind and of its adapters: ``adapters(kind)``."""

    def copy(kind="llama"):
        return shutil.copytree(adapters_by_kind[kind], tmp_path, dirs_exist_ok=True)

    return copy


@pytest.fixture
def fine_tunes(stored_fine_tunes, tmp_path):
    """A copy of the base and of its fine-tunes."""
    return shutil.copytree(stored_fine_tunes, tmp_path, dirs_exist_ok=True)


def base_model(folder, kind="llama"):
    return type(MODELS[kind]()).from_pretrained(folder / "base")


def recipe(folder, **content):
    """The recipe of a merge of `code` and `math`."""
    on_base = (folder / "code" / "adapter_config.json").exists()
    experts = {name: {"model": "base", "adapter": name} if on_base else name for name in ("code", "math")}
    content = {"base": "base", "experts": experts, "method": "linear", "output": ADAPTER, **content}
    return merger.Recipe.parse(content, folder)


def with_peft(folder, kind="llama"):
    """The tensors of the base with the adapter that peft merges into it."""
    return PeftModel.from_pretrained(base_model(folder, kind), folder / "out").merge_and_unload().state_dict()


def factors(folder):
    return load_file(folder / "out" / "adapter_model.safetensors")


# --- what it holds ---


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["linear", "knots", "core_space"])
def test_an_adapter_of_adapters_is_the_merge(adapters, tmp_path, kind, method):
    folder = adapters(kind)
    result = merger.merge(recipe(folder, method=method))
    merger.merge(recipe(folder, method=method, output="model"))
    adapted = with_peft(folder, kind)
    merged, base = load(tmp_path / "model"), load(folder / "base")
    for name, value in merged.items():
        torch.testing.assert_close(adapted[name], value, rtol=0, atol=1e-6, msg=name)
    assert sum(not torch.equal(value, base[name]) for name, value in merged.items()) == result.tensors["merged"]
    assert result.notes == ["the adapter holds the change of its matrices to rounding"]


def test_a_ranking_of_the_model_counts_what_no_adapter_changes(adapters):
    folder, method = adapters(), {"method": "ties", "parameters": {"density": 0.1, "scope": "global"}}
    merger.merge(recipe(folder, **method, output={**ADAPTER, "rank": 16}))
    adapted = with_peft(folder)
    merger.merge(recipe(folder, **method, output="model"))
    for name, value in load(folder / "model").items():
        torch.testing.assert_close(adapted[name], value, rtol=0, atol=1e-6, msg=name)


def test_its_rank_is_by_default_the_sum_of_the_ranks_of_the_adapters(adapters, tmp_path):
    merger.merge(recipe(adapters()))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (5, 5, {})
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "down_proj"}
    shapes = {tuple(value.shape) for name, value in factors(tmp_path).items() if Q in name}
    assert shapes == {(5, 16), (16, 5)}


def changes(folder, **content):
    """The changes of the tensors that the merge as a model makes, in float64."""
    merger.merge(recipe(folder, **{**content, "output": "model"}))
    merged, base = load(folder / "model"), load(folder / "base")
    return {name: (value.double() - base[name].double()).numpy() for name, value in merged.items()}


def test_a_rank_keeps_the_strongest_directions_of_the_merge(fine_tunes, tmp_path):
    method = {"method": "ties", "parameters": {"density": 0.5}}
    result = merger.merge(recipe(fine_tunes, **method, output={**ADAPTER, "rank": 3}))
    expected = changes(fine_tunes, **method)
    stored = factors(tmp_path)
    omitted, matrices = 0.0, 0.0
    for name, change in expected.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in stored:
            continue
        left, values, right = numpy.linalg.svd(change)
        product = (stored[f"{module}.lora_B.weight"].double() @ stored[f"{module}.lora_A.weight"].double()).numpy()
        numpy.testing.assert_allclose(product, left[:, :3] * values[:3] @ right[:3], atol=1e-6)
        omitted, matrices = omitted + (values[3:] ** 2).sum(), matrices + (values**2).sum()
    total = sum((change**2).sum() for change in expected.values())
    error, whole = (omitted / matrices) ** 0.5, ((omitted + total - matrices) / total) ** 0.5
    assert len(stored) == 2 * (2 * 7 + 1)  # the linear layers of two blocks, and the head
    assert any(f"error is {error:.4f}" in note and f"and {whole:.4f} of the model's" in note for note in result.notes)
    left_out = ((total - matrices) / total) ** 0.5
    assert any(f"and 3 more, {left_out:.4f} of the norm of the model's" in note for note in result.notes)
    assert result.tensors == {"merged": 15, "copied": 0, "dropped": 0}


def test_a_rank_above_that_of_a_matrix_is_that_of_the_matrix(fine_tunes, tmp_path):
    merger.merge(recipe(fine_tunes, output={**ADAPTER, "rank": 12}))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    narrow = {name for name in config["target_modules"] if "k_proj" in name or "v_proj" in name}  # 8 x 16
    assert config["r"] == 12
    assert config["rank_pattern"] == dict.fromkeys(sorted(narrow), 8)
    adapted, expected = with_peft(fine_tunes), load(fine_tunes / "base")
    change = changes(fine_tunes)["model.layers.1.self_attn.k_proj.weight"]
    name = "model.layers.1.self_attn.k_proj.weight"
    numpy.testing.assert_allclose((adapted[name] - expected[name]).numpy(), change, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "on_hub", "expected"),
    [("org/name@v2", True, ("org/name", "v2")), ("org/name", True, ("org/name", None)), ("a@b", False, ("a@b", None))],
)
def test_a_revision_of_the_base_has_a_key_of_its_own(base, on_hub, expected):
    config = lora_config(base, {Q: 4}, on_hub=on_hub, fan_in_fan_out=False)
    assert (config["base_model_name_or_path"], config.get("revision")) == expected


def test_matrices_that_a_rule_keeps_are_not_in_it(adapters, tmp_path):
    merger.merge(recipe(adapters(), rules=[{"tensors": "down_proj", "use": "base"}]))
    assert {name for name in factors(tmp_path) if "q_proj" not in name} == set()


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_factors_have_the_dtype_of_the_recipe_and_else_float32(adapters, tmp_path, dtype, expected):
    result = merger.merge(recipe(adapters(), output={**ADAPTER, "dtype": dtype}))
    assert {value.dtype for value in factors(tmp_path).values()} == {expected}
    assert ("to rounding" in result.notes[0]) == (dtype is None)


def test_what_no_adapter_changes_is_not_read(adapters, tmp_path):
    result = merger.merge(recipe(adapters()))
    assert result.bytes_read == 2 * (16 * 16 + 16 * 24) * 4 * 3
    records = merger.engine.merge.Manifest.read(tmp_path / "out").tensors
    assert records["model.embed_tokens.weight"] == {
        "kind": "embedding",
        "stored as": {},
        "copied from": "base",
    }


# --- what every output promises ---


def test_the_plan_says_what_is_written(fine_tunes, tmp_path):
    planned = merger.plan(recipe(fine_tunes, output={**ADAPTER, "rank": 3}))
    merger.merge(planned.recipe)
    assert planned.bytes_written == sum(value.nbytes for value in factors(tmp_path).values())
    assert planned.left_out == {"model.embed_tokens.weight", NORM, *(
        f"model.layers.{i}.{norm}_layernorm.weight" for i in (0, 1) for norm in ("input", "post_attention")
    )}  # fmt: skip
    planned.close()


def test_it_is_verified_by_its_record_and_from_its_inputs(adapters, tmp_path):
    merger.merge(recipe(adapters("gpt2")))
    verification = merger.verify(tmp_path / "out", deep=merger.DeepCheck(sample=100))
    assert (verification.differences, len(verification.recomputed)) == ((), 12)
    file = tmp_path / "out" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    differences = merger.verify(tmp_path / "out", deep=merger.DeepCheck(sample=100)).differences
    assert [difference.tensor for difference in differences if "are not what its inputs make" in difference.what]
    assert any("SHA-256" in difference.what for difference in differences)


def test_a_lock_knows_when_it_is_done(adapters, tmp_path):
    merge_recipe = recipe(adapters())
    lock(merge_recipe, tmp_path / "recipe.lock")
    assert not is_done(merge_recipe, tmp_path / "recipe.lock")
    merger.merge(merge_recipe)
    assert is_done(merge_recipe, tmp_path / "recipe.lock")
    other = recipe(adapters(), output={**ADAPTER, "rank": 1})
    with pytest.raises(RecipeError, match=r"recipe\.output\.rank was nothing when it was locked, and is 1"):
        check_lock(other, tmp_path / "recipe.lock")


def test_a_run_after_a_stopped_one_writes_the_same_bytes(fine_tunes, monkeypatch):
    merge_recipe = recipe(fine_tunes, output={**ADAPTER, "rank": 2})
    merger.merge(merge_recipe)
    expected = {path.name: path.read_bytes() for path in (fine_tunes / "out").iterdir()}
    shutil.rmtree(fine_tunes / "out")

    def stop(prepared, writer, *_):
        writer.digests()
        raise KeyboardInterrupt

    monkeypatch.setattr(merger.engine.merge, "_write_side_files", stop)
    with pytest.raises(KeyboardInterrupt):
        merger.merge(merge_recipe)
    monkeypatch.undo()
    result = merger.merge(merge_recipe)
    assert result.bytes_written == 0
    assert {path.name: path.read_bytes() for path in (fine_tunes / "out").iterdir()} == expected


def test_the_record_of_a_model_has_no_new_keys(adapters, tmp_path):
    output = recipe(adapters(), output="model").spelled_out()["output"]
    assert set(output) == {"path", "dtype", "shard_size", "tokenizer"}


def test_an_inspection_takes_it_for_a_model_on_its_base(adapters, tmp_path):
    merge_recipe = recipe(adapters())
    shown = merger.inspect(merge_recipe)
    merger.merge(merge_recipe)
    inspection = merger.inspect_merge(tmp_path / "out")
    assert inspection.notes == []
    assert inspection.experts == shown.experts == ["code", "math"]


# --- what it refuses ---

WITH_TEXT = {"calibration": {"data": "text.jsonl"}}
REFUSED = {
    "a rank of a model": ({"output": {"path": "out", "rank": 4}}, r"output\.rank: is that of an adapter; add `form"),
    "several experts": ({"method": "emr"}, r"method: makes more than one model, and an adapter holds one"),
    "merged blocks": ({"method": "regmean_pp", **WITH_TEXT}, r"method: looks behind merged blocks"),
    "a copy": ({"rules": [{"tensors": "q_proj", "use": "code"}]}, r"use: an adapter holds changes"),
    "other blocks": (
        {"layers": [{"model": "base", "range": [0, 1]}]},
        r"layers: an adapter keeps the blocks of the base",
    ),
    "padded rows": ({"output": {**ADAPTER, "pad_rows_to": 64}}, r"output\.pad_rows_to: an adapter keeps the rows"),
    "an adapter below": (
        {"base": {"model": "base", "adapter": "code"}},
        r"base\.adapter: an adapter is for a model alone; merge the base's adapter",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_cannot_hold_the_merge_is_refused(adapters, tmp_path, name):
    content, message = REFUSED[name]
    with pytest.raises(RecipeError, match=message):
        recipe(adapters(), **content)


def test_fine_tunes_need_a_rank(fine_tunes, tmp_path):
    with pytest.raises(RecipeError, match=r"output: needs a rank, as in `rank: 64`, since code is no adapter"):
        merger.merge(recipe(fine_tunes))
    assert not list(tmp_path.glob("out*"))


def test_tokens_that_an_expert_added_are_refused(fine_tunes, tmp_path):
    model = base_model(fine_tunes)
    model.resize_token_embeddings(43, mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    content = {"base": "base", "experts": {"grown": "grown"}, "method": "linear"}
    grown = merger.Recipe.parse({**content, "output": {**ADAPTER, "rank": 2}}, tmp_path)
    with pytest.raises(RecipeError, match=r"keeps the tokens of the base, but lm_head\.weight has other rows"):
        merger.merge(grown)


def test_values_that_overflow_the_dtype_stop_it(fine_tunes, tmp_path):
    output = {**ADAPTER, "rank": 2, "dtype": "float16"}
    huge = {"method": "task_arithmetic", "parameters": {"lambda": 1e11}}
    with pytest.raises(merger.CheckpointError, match=r"the merged values overflow F16; lower lambda"):
        merger.merge(recipe(fine_tunes, **huge, output=output))
    assert not list(tmp_path.glob("out*"))
