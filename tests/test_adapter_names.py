"""Names of an adapter's tensors: in memory and on disk, of wrapped models, beside a model, and of another one."""

import json
import shutil

import pytest
import torch
from adapters import PREFIX, Adapters
from checkpoints import load, same_bits
from peft import PeftModel
from safetensors.torch import save_file
from tiny_models import llama, llava, qwen2_vl

from merger import merge
from merger.checkpoint.opening import open_checkpoint
from merger.errors import CheckpointError
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers, about tied weights

Q = ["q_proj"]


@pytest.fixture
def adapters(tmp_path):
    return lambda make, tied=True: Adapters(tmp_path, make, tied)


# --- names in memory and on disk --------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("make", [llava, qwen2_vl])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "rank_pattern": {"model.language_model.layers.0.self_attn.q_proj": 2}},
    ],
    ids=["all linear", "head", "embedding", "pattern"],
)
def test_a_vision_language_models_adapter_has_other_names_than_its_checkpoint(adapters, make, tied, config):
    adapter = adapters(make, tied)
    expected = adapter.train(**config)
    logits, _, _ = adapter.merged()
    adapter.close(logits, expected)


def test_every_weight_of_a_vision_language_model_is_pefts(adapters):
    adapter = adapters(llava, tied=False)
    adapter.train(target_modules="all-linear")
    peft = PeftModel.from_pretrained(adapter.base(), adapter.folder / "lora").merge_and_unload().state_dict()
    adapter.merged()
    for name, tensor in adapter.kind.from_pretrained(adapter.folder / "out").state_dict().items():
        torch.testing.assert_close(tensor, peft[name], rtol=0, atol=1e-6, msg=name)


def test_a_name_that_fits_two_tensors_once_the_nesting_is_gone_is_refused(tmp_path):
    names = ("text_model.layers.0.q.weight", "vision_model.layers.0.q.weight")
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.ones(4, 4) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    factors = {"lora_A.weight": torch.ones(1, 4), "lora_B.weight": torch.ones(4, 1)}
    save_file(
        {f"{PREFIX}model.layers.0.q.{n}": t for n, t in factors.items()}, tmp_path / "lora/adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match="belongs to no tensor of the model"):
        open_checkpoint(".", "lora", label="a", folder=tmp_path)


# --- prefixes of wrapped models -----------------------------------------------------------------------------

WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled within peft": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "data parallel": lambda name: f"module.{name}",
    "data parallel within peft": lambda name: name.replace(PREFIX, f"{PREFIX}module."),
    "both": lambda name: f"module._orig_mod.{name}",
    "both, the other way": lambda name: f"_orig_mod.module.{name}",
    "twice": lambda name: f"module.module.{name}",
    "blocks compiled one by one": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "sharded": lambda name: f"_fsdp_wrapped_module.{name.replace('layers.0.', 'layers.0._fsdp_wrapped_module.')}",
    "checkpointed": lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_an_adapter_of_a_wrapped_model_is_that_of_the_model(adapters, wrapper):
    adapter = adapters(llama)
    expected = adapter.train(target_modules="all-linear", rank_pattern={"model.layers.0.self_attn.q_proj": 2})
    adapter.rename(lambda name: [WRAPPED[wrapper](name)])
    logits, _, _ = adapter.merged()
    adapter.close(logits, expected)


@pytest.mark.parametrize("wrapper", [wrapper for wrapper in WRAPPED if "peft" not in wrapper])
@pytest.mark.parametrize("wrapped", [["base"], ["a"], ["base", "a"]], ids="+".join)
def test_a_checkpoint_of_a_wrapped_model_is_that_of_the_model(adapters, wrapper, wrapped):
    adapter = adapters(llama)
    shutil.copytree(adapter.folder / "base", adapter.folder / "a")
    recipe = Recipe.parse(
        {"base": "base", "experts": {"a": "a"}, "method": "linear", "output": {"path": "out"}}, adapter.folder
    )
    expected = load(adapter.folder / "base")
    for folder in wrapped:
        adapter.rename(lambda name: [WRAPPED[wrapper](name)], folder, "model.safetensors")

    merge(recipe)

    assert same_bits(load(adapter.folder / "out"), expected)


def test_a_module_of_the_model_that_is_called_module_keeps_its_name(tmp_path):
    tensors = {"module.a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(".", None, label="a", folder=tmp_path) as model:
        assert model.tensors.keys() == tensors.keys()


def test_a_tensor_that_is_stored_with_and_without_its_prefix_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2), "_orig_mod.a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds a\.weight twice, as .* and as .*; remove one of them"):
        open_checkpoint(".", None, label="a", folder=tmp_path)


# --- an adapter beside a model, and one of another model --------------------------------------------------------


def test_an_adapter_beside_a_model_is_not_left_out_silently(adapters):
    adapter = adapters(llama)
    expected = adapter.train(target_modules=Q)
    shutil.copytree(adapter.folder / "base", adapter.folder / "a")
    for file in (adapter.folder / "lora").iterdir():
        shutil.copy(file, adapter.folder / "a")

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("a", None, label="a", folder=adapter.folder)
    logits, _, _ = adapter.merged(model="a", adapter="a")

    assert str(caught.value) == (
        "a: a holds a model and beside it a PEFT adapter, which transformers loads on top; write "
        "{model: a, adapter: a} to merge the two, or move adapter_config.json elsewhere to leave it out"
    )
    adapter.close(logits, expected)


def test_the_manifest_tells_the_files_of_a_model_from_those_of_the_adapter_beside_it(adapters):
    adapter = adapters(llama)
    adapter.train(target_modules=Q)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter.folder / "lora" / file, adapter.folder / "base")
    shutil.copytree(adapter.folder / "base", adapter.folder / "a")
    (adapter.folder / "base" / "adapter_config.json").unlink()
    adapter.merged(model="a", adapter="a")
    record = json.loads((adapter.folder / "out" / "merger.json").read_text())["inputs"]["a"]
    assert record["files"].keys() == {"model.safetensors"}
    assert record["adapter"]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("trained_on", "revision", "note"),
    [
        ("org/Base", None, None),
        ("/home/someone/models/base/", None, None),
        ("/cache/hub/models--org--Base/snapshots/0123", None, None),
        ("org/Known-By-Its-Config", None, None),
        ("", None, None),
        (None, None, None),
        ("someone/Other-7B", None, "someone/Other-7B"),
        ("someone/Other-7B", "0123abc", "someone/Other-7B@0123abc"),
    ],
)
def test_an_adapter_of_another_base_is_named_once(adapters, trained_on, revision, note):
    adapter = adapters(llama)
    adapter.train(target_modules=Q)
    for file, keys in {
        "lora/adapter_config.json": {"base_model_name_or_path": trained_on, "revision": revision},
        "base/config.json": {"_name_or_path": "org/Known-By-Its-Config"},
    }.items():
        path = adapter.folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    expert = {"model": "base", "adapter": "lora"}
    document = {"base": "base", "experts": {"a": expert}, "method": "linear", "output": {"path": "out"}}

    planned = plan(Recipe.parse(document, adapter.folder))
    planned.close()

    expected = f"a: the adapter lora was trained on {note}, but is added to base; make sure that the two have the same"
    assert planned.notes == (() if note is None else (f"{expected} weights",))
