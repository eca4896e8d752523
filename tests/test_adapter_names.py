"""Adapters on tied and on vision-language models: the merge of one is the model that peft loads."""

import json
import shutil

import pytest
import torch
from checkpoints import load, same_bits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from merger import merge
from merger.checkpoint.opening import open_checkpoint
from merger.errors import CheckpointError
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers, about tied weights

IDS = torch.tensor([[3, 9, 20, 4]])
PREFIX = "base_model.model."
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def llama(tied=True):
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def gpt2(tied=True):
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, tie_word_embeddings=tied))


def llava(tied=True):
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, tie_word_embeddings=tied)
    )


def qwen2_vl(tied=True):
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4, "spatial_merge_size": 1,
        "temporal_patch_size": 1,
    }  # fmt: skip
    tokens = {"image_token_id": 36, "video_token_id": 37, "vision_start_token_id": 38, "vision_end_token_id": 39}
    text = {**SIZES, "rope_parameters": rope}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **tokens)
    )


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


class Adapters:
    """A base, and random adapters on it, in folders of a temporary one."""

    def __init__(self, folder, make, tied):
        torch.manual_seed(0)
        model = make(tied)
        self.folder, self.kind = folder, type(model)
        model.save_pretrained(folder / "base")

    def base(self, rows=None):
        model = self.kind.from_pretrained(self.folder / "base")
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    def train(self, rows=None, **config):
        """Saves an adapter; the logits of the model that peft loads."""
        model = get_peft_model(self.base(rows), LoraConfig(r=4, lora_alpha=8, **config))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(self.folder / "lora")
        with torch.no_grad():
            return PeftModel.from_pretrained(self.base(rows), self.folder / "lora")(input_ids=IDS).logits

    def merged(self, **expert):
        """The merge of the adapter alone: its logits, tensors and notes."""
        document = {
            "base": "base",
            "experts": {"a": {"model": "base", "adapter": "lora", **expert}},
            "method": "task_arithmetic",
            "output": {"path": "out"},
        }
        result = merge(Recipe.parse(document, self.folder), force=True)
        model, info = self.kind.from_pretrained(self.folder / "out", output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            return model(input_ids=IDS).logits, load(self.folder / "out"), result.notes

    def rename(self, function, folder="lora", file="adapter_model.safetensors"):
        """Stores the adapter's tensors under the names, one or several, that ``function`` gives for each."""
        stored = {new: tensor.clone() for name, tensor in load(self.folder / folder).items() for new in function(name)}
        save_file(stored, self.folder / folder / file, {"format": "pt"})

    def config(self, name="out"):
        return json.loads((self.folder / name / "config.json").read_text())

    def close(self, logits, expected):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.fixture
def adapters(tmp_path):
    return lambda make, tied=True: Adapters(tmp_path, make, tied)


# --- tied heads -------------------------------------------------------------------------------------------

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
    made = adapters(llama)
    if stored == "twice":
        tensors = load(made.folder / "base")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, made.folder / "base" / "model.safetensors", {"format": "pt"})
    config, tied = ON_TIED[case]
    expected = made.train(**config)

    logits, tensors, _ = made.merged()

    made.close(logits, expected)
    assert made.config()["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in tensors) is (not tied or stored == "twice")
    embedding = tensors["model.embed_tokens.weight"]
    assert same_bits(tensors.get("lm_head.weight", embedding), embedding) is tied


@pytest.mark.parametrize("config", [{"modules_to_save": ["wte"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_gpt2_is_untied_by_a_copy_of_one_of_its_two(adapters, config):
    made = adapters(gpt2)
    expected = made.train(target_modules=["c_attn"], **config)
    logits, _, _ = made.merged()
    made.close(logits, expected)
    assert made.config()["tie_word_embeddings"] is False


def test_a_head_that_the_adapter_leaves_behind_is_said(adapters):
    made = adapters(llama)
    made.train(**ON_TIED["a copy of the embedding"][0])
    _, tensors, notes = made.merged()
    assert same_bits(tensors["lm_head.weight"], load(made.folder / "base")["model.embed_tokens.weight"])
    assert [note for note in notes if note.startswith("a: lm_head.weight differs from model.embed_tokens.weight")]


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
@pytest.mark.parametrize("plain", [True, False], ids=["three names", "two names"])
def test_a_module_that_was_saved_whole_is_its_trained_copy(adapters, copy, plain):
    made = adapters(llama, tied=False)
    expected = made.train(target_modules=Q, modules_to_save=BOTH)
    original = load(made.folder / "base")["model.embed_tokens.weight"]

    def names(name):
        module = name.removesuffix(".weight")
        saved = "lora" not in name
        return [f"{module}.{copy}.weight", *([name] if plain else [])] if saved else [name]

    made.rename(names)
    tensors = load(made.folder / "lora")
    tensors[f"{PREFIX}model.embed_tokens.original_module.weight"] = original.clone()
    save_file(tensors, made.folder / "lora" / "adapter_model.safetensors")

    logits, _, _ = made.merged()

    made.close(logits, expected)


def test_peft_itself_saves_three_names_where_rows_were_added(adapters):
    made = adapters(llama)
    made.train(**ON_TIED["rows added to a copy"][0])
    stored = {name.removeprefix(PREFIX) for name in load(made.folder / "lora") if "embed_tokens" in name}
    kinds = ("", "modules_to_save.", "original_module.")
    assert stored == {f"model.embed_tokens.{kind}weight" for kind in kinds}


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
    made = adapters(make, tied)
    expected = made.train(**config)
    logits, _, _ = made.merged()
    made.close(logits, expected)


def test_every_weight_of_a_vision_language_model_is_pefts(adapters):
    made = adapters(llava, tied=False)
    made.train(target_modules="all-linear")
    peft = PeftModel.from_pretrained(made.base(), made.folder / "lora").merge_and_unload().state_dict()
    made.merged()
    for name, tensor in made.kind.from_pretrained(made.folder / "out").state_dict().items():
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


@pytest.mark.parametrize("how", WRAPPED)
def test_an_adapter_of_a_wrapped_model_is_that_of_the_model(adapters, how):
    made = adapters(llama)
    expected = made.train(target_modules="all-linear", rank_pattern={"model.layers.0.self_attn.q_proj": 2})
    made.rename(lambda name: [WRAPPED[how](name)])
    logits, _, _ = made.merged()
    made.close(logits, expected)


@pytest.mark.parametrize("how", [how for how in WRAPPED if "peft" not in how])
@pytest.mark.parametrize("wrapped", [["base"], ["a"], ["base", "a"]], ids="+".join)
def test_a_checkpoint_of_a_wrapped_model_is_that_of_the_model(adapters, how, wrapped):
    made = adapters(llama)
    shutil.copytree(made.folder / "base", made.folder / "a")
    recipe = Recipe.parse(
        {"base": "base", "experts": {"a": "a"}, "method": "linear", "output": {"path": "out"}}, made.folder
    )
    expected = load(made.folder / "base")
    for folder in wrapped:
        made.rename(lambda name: [WRAPPED[how](name)], folder, "model.safetensors")

    merge(recipe)

    assert same_bits(load(made.folder / "out"), expected)


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
    made = adapters(llama)
    expected = made.train(target_modules=Q)
    shutil.copytree(made.folder / "base", made.folder / "a")
    for file in (made.folder / "lora").iterdir():
        shutil.copy(file, made.folder / "a")

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("a", None, label="a", folder=made.folder)
    logits, _, _ = made.merged(model="a", adapter="a")

    assert str(caught.value) == (
        "a: a holds a model and beside it a PEFT adapter, which transformers loads on top; write "
        "{model: a, adapter: a} to merge the two, or move adapter_config.json elsewhere to leave it out"
    )
    made.close(logits, expected)


def test_the_manifest_tells_the_files_of_a_model_from_those_of_the_adapter_beside_it(adapters):
    made = adapters(llama)
    made.train(target_modules=Q)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(made.folder / "lora" / file, made.folder / "base")
    shutil.copytree(made.folder / "base", made.folder / "a")
    (made.folder / "base" / "adapter_config.json").unlink()
    made.merged(model="a", adapter="a")
    said = json.loads((made.folder / "out" / "merger.json").read_text())["inputs"]["a"]
    assert said["files"].keys() == {"model.safetensors"}
    assert said["adapter"]["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"}


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
    made = adapters(llama)
    made.train(target_modules=Q)
    for file, keys in {
        "lora/adapter_config.json": {"base_model_name_or_path": trained_on, "revision": revision},
        "base/config.json": {"_name_or_path": "org/Known-By-Its-Config"},
    }.items():
        path = made.folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    expert = {"model": "base", "adapter": "lora"}
    document = {"base": "base", "experts": {"a": expert}, "method": "linear", "output": {"path": "out"}}

    planned = plan(Recipe.parse(document, made.folder))
    planned.close()

    expected = f"a: the adapter lora was trained on {note}, but is added to base; make sure that the two have the same"
    assert planned.notes == (() if note is None else (f"{expected} weights",))
