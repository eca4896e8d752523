"""Adapters on tied models, and modules that peft saved whole: the merge of one is the model that peft loads."""

import json

import pytest
import torch
from adapters import PREFIX, Adapters
from checkpoints import load, same_bits
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import gpt2, llama, t5

from merger.checkpoint.opening import open_checkpoint
from merger.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers, about tied weights


@pytest.fixture
def adapters(tmp_path):
    return lambda make, tied=True: Adapters(tmp_path, make, tied)


TABLE, BOTH = "embed_tokens", ["embed_tokens", "lm_head"]
Q = ["q_proj"]
ON_TIED = {  # the adapter, and whether embedding and head are still one
    "a copy of the embedding": ({"target_modules": Q, "modules_to_save": [TABLE]}, False),
    "copies of both, tied by peft": (
        {"target_modules": Q, "modules_to_save": [TABLE], "ensure_weight_tying": True},
        True,
    ),
    "a copy of the head": ({"target_modules": Q, "modules_to_save": ["lm_head"]}, False),
    "copies of both": ({"target_modules": Q, "modules_to_save": BOTH}, False),
    "LoRA on the embedding": ({"target_modules": [*Q, TABLE]}, False),
    "LoRA on the head": ({"target_modules": [*Q, "lm_head"]}, False),
    "LoRA on both": ({"target_modules": Q + BOTH}, False),
    "LoRA on both, tied by peft": ({"target_modules": [*Q, TABLE], "ensure_weight_tying": True}, True),
    "tokens": ({"target_modules": Q, "trainable_token_indices": [3, 9]}, True),
    "tokens of both": ({"target_modules": Q, "trainable_token_indices": {TABLE: [3, 9], "lm_head": [3, 9]}}, True),
    "other tokens of each": (
        {"target_modules": Q, "trainable_token_indices": {TABLE: [3, 9], "lm_head": [3, 20]}},
        False,
    ),
    "tokens of the head": ({"target_modules": Q, "trainable_token_indices": {"lm_head": [9]}}, False),
    "neither": ({"target_modules": Q}, True),
    "rows added": ({"rows": 42, "target_modules": Q}, True),
    "rows added to a copy": ({"rows": 42, "target_modules": Q, "modules_to_save": [TABLE]}, False),
    "rows added under LoRA": ({"rows": 42, "target_modules": [*Q, TABLE]}, False),
    "rows added under tokens": ({"rows": 42, "target_modules": Q, "trainable_token_indices": [3, 41]}, True),
}


@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize("case", ON_TIED)
def test_an_adapter_on_a_tied_model_is_what_peft_loads(adapters, case, stored):
    adapter = adapters(llama)
    if stored == "twice":
        tensors = load(adapter.folder / "base")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, adapter.folder / "base" / "model.safetensors", {"format": "pt"})
    config, tied = ON_TIED[case]
    expected = adapter.train(**config)

    logits, tensors, _ = adapter.merged()

    adapter.close(logits, expected)
    assert adapter.config()["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in tensors) is (not tied or stored == "twice")
    embedding = tensors["model.embed_tokens.weight"]
    assert same_bits(tensors.get("lm_head.weight", embedding), embedding) is tied


@pytest.mark.parametrize("config", [{"modules_to_save": ["wte"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_gpt2_is_untied_by_a_copy_of_one_of_its_two(adapters, config):
    adapter = adapters(gpt2)
    expected = adapter.train(target_modules=["c_attn"], **config)
    logits, _, _ = adapter.merged()
    adapter.close(logits, expected)
    assert adapter.config()["tie_word_embeddings"] is False


def test_a_head_that_the_adapter_leaves_behind_is_said(adapters):
    adapter = adapters(llama)
    adapter.train(**ON_TIED["a copy of the embedding"][0])
    _, tensors, notes = adapter.merged()
    assert same_bits(tensors["lm_head.weight"], load(adapter.folder / "base")["model.embed_tokens.weight"])
    assert [note for note in notes if note.startswith("a: lm_head.weight differs from model.embed_tokens.weight")]


def test_lora_in_the_blocks_of_an_encoder_decoder_leaves_its_table_alone(tmp_path):
    torch.manual_seed(0)
    t5().save_pretrained(tmp_path / "base")
    model = get_peft_model(t5().from_pretrained(tmp_path / "base"), LoraConfig(r=4, target_modules=["q", "wo"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "lora")
    merged = model.merge_and_unload().state_dict()
    with open_checkpoint("base", "lora", label="a", folder=tmp_path) as adapted:
        assert adapted.tensors.keys() == load(tmp_path / "base").keys()
        for name in adapted.tensors:
            torch.testing.assert_close(adapted.read(name), merged[name], rtol=0, atol=1e-6, msg=name)


def test_a_tied_table_that_has_further_names_is_not_changed_alone(tmp_path):
    torch.manual_seed(0)
    t5().save_pretrained(tmp_path / "base")
    tensors = {f"{PREFIX}shared.weight": torch.ones(40, 16)}
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "modules_to_save": ["shared"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"changes shared.weight alone, .* peft's merge_and_unload"):
        open_checkpoint("base", "lora", label="a", folder=tmp_path)


# --- modules_to_save in threes ------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", ["modules_to_save", "modules_to_save.default"])
@pytest.mark.parametrize("third_name", [True, False], ids=["three names", "two names"])
def test_a_module_that_was_saved_whole_is_its_trained_copy(adapters, copy, third_name):
    adapter = adapters(llama, tied=False)
    expected = adapter.train(target_modules=Q, modules_to_save=BOTH)
    original = load(adapter.folder / "base")["model.embed_tokens.weight"]

    def names(name):
        module = name.removesuffix(".weight")
        saved = "lora" not in name
        return [f"{module}.{copy}.weight", *([name] if third_name else [])] if saved else [name]

    adapter.rename(names)
    tensors = load(adapter.folder / "lora")
    tensors[f"{PREFIX}model.embed_tokens.original_module.weight"] = original.clone()
    save_file(tensors, adapter.folder / "lora" / "adapter_model.safetensors")

    logits, _, _ = adapter.merged()

    adapter.close(logits, expected)


def test_peft_itself_saves_three_names_where_rows_were_added(adapters):
    adapter = adapters(llama)
    adapter.train(**ON_TIED["rows added to a copy"][0])
    stored = {name.removeprefix(PREFIX) for name in load(adapter.folder / "lora") if "embed_tokens" in name}
    kinds = ("", "modules_to_save.", "original_module.")
    assert stored == {f"model.embed_tokens.{kind}weight" for kind in kinds}
