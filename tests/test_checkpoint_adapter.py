"""LoRA adapters: what they add is what peft adds, to the bit where the base is the model they sit on."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from merger.checkpoint.opening import open_checkpoint
from merger.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers, about each other

LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=40, attention_bias=True,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=8, tie_word_embeddings=False)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]

CASES = {
    "plain": ("llama", {"target_modules": ALL}),
    "rslora": ("llama", {"target_modules": ALL, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 5, "proj": 3},
            "alpha_pattern": {"model.layers.0.self_attn.v_proj": 1, "v_proj": 2, "^model.layers.1.mlp.up_proj": 7},
        },
    ),
    "rslora by pattern": ("llama", {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"k_proj": 2}}),
    "head saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "head adapted": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding adapted": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "norms saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "all biases": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "its biases": ("llama", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "orthogonal": ("llama", {"target_modules": ALL, "init_lora_weights": "orthogonal"}),
    "some layers": ("llama", {"target_modules": ALL, "layers_to_transform": [1]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [39, 3]}),
    "tokens of both": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [0, 7], "lm_head": [7]}},
    ),
    "conv1d": ("gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True}),
    "conv1d, flag forgotten": ("gpt2", {"target_modules": CONV1D}),
    "square conv1d": ("gpt2", {"target_modules": r".*\.attn\.c_proj"}),
    "conv1d and linear": ("gpt2", {"target_modules": [*CONV1D, "lm_head", "wte"]}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folder and the model of each base."""
    torch.manual_seed(0)
    models = {}
    for name, model in {"llama": LlamaForCausalLM(LLAMA), "gpt2": GPT2LMHeadModel(GPT2)}.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        models[name] = folder, type(model)
    return models


def adapted(bases, folder, base, **config):
    """A random adapter in ``folder``, and the tensors of the model that peft makes of it."""
    directory, kind = bases[base]
    model = get_peft_model(kind.from_pretrained(directory), LoraConfig(r=4, lora_alpha=6, **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    merged = PeftModel.from_pretrained(kind.from_pretrained(directory), folder).merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def opened(bases, name, adapter, **options):
    return open_checkpoint(str(bases[name][0]), str(adapter), label="math", folder=adapter, **options)


def agrees(model, expected):
    changed = {*model.changes, *model.rows}
    assert {name for name in model.tensors if not torch.equal(model.read(name), expected[name])} <= changed
    for name in model.tensors:
        torch.testing.assert_close(model.read(name), expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_those_of_merge_and_unload(bases, tmp_path, name):
    base, config = CASES[name]
    expected = adapted(bases, tmp_path, base, **config)
    with opened(bases, base, tmp_path) as model:
        agrees(model, expected)
        assert any(not torch.equal(model.read(name), tensor) for name, tensor in stored(bases, base).items())


def stored(bases, base):
    return load_file(bases[base][0] / "model.safetensors")


# --- names, formats, places ---


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_names_may_differ_by_the_prefix_of_the_model(bases, tmp_path, base, change):
    """GPT-2 on the Hub has h.0..., peft says transformer.h.0..."""
    expected = adapted(bases, tmp_path / "adapter", base, target_modules="all-linear", modules_to_save=["wte"])
    if change == "shorter":
        renamed = {n.removeprefix("model.").removeprefix("transformer."): n for n in expected}
    else:
        renamed = {f"language_model.{n}": n for n in expected}
    config = bases[base][0] / "config.json"
    shutil.copy(config, tmp_path)
    save_file({n: stored(bases, base)[old] for n, old in renamed.items()}, tmp_path / "model.safetensors")
    with open_checkpoint(str(tmp_path), "adapter", label="m", folder=tmp_path) as model:
        assert model.changes
        agrees(model, {n: expected[old] for n, old in renamed.items()})


def test_older_names_of_saved_modules_are_known(bases, tmp_path):
    expected = adapted(bases, tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    rename(tmp_path, "lm_head.weight", "lm_head.modules_to_save.weight")
    with opened(bases, "llama", tmp_path) as model:
        agrees(model, expected)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_pickles_do_as_well(bases, tmp_path, base):
    expected = adapted(bases, tmp_path / "adapter", base, target_modules="all-linear")
    torch.save(
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"), tmp_path / "adapter" / "adapter_model.bin"
    )
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(stored(bases, base), tmp_path / "pytorch_model.bin")
    shutil.copy(bases[base][0] / "config.json", tmp_path)
    with open_checkpoint(str(tmp_path), "adapter", label="m", folder=tmp_path) as model:
        agrees(model, expected)
        assert [file.name for file in model.files] == [
            "adapter_config.json", "adapter_model.bin", "pytorch_model.bin",
        ]  # fmt: skip


def test_a_vocabulary_that_grew_is_that_of_the_adapter(bases, tmp_path):
    adapted(bases, tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    grown = {"model.embed_tokens.weight": torch.randn(43, 32), "lm_head.weight": torch.randn(43, 32)}
    store(tmp_path, grown)
    with opened(bases, "llama", tmp_path) as model:
        for name, values in grown.items():
            assert model.tensors[name].shape == (43, 32)
            assert torch.equal(model.read(name), values)


def test_a_vocabulary_that_grew_without_its_head_is_one_line(bases, tmp_path):
    adapted(bases, tmp_path, "llama", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    store(tmp_path, {"model.embed_tokens.weight": torch.randn(43, 32)})
    with pytest.raises(
        CheckpointError,
        match=r"has 43 rows for model.embed_tokens.weight, but lm_head.weight has 40; .* must store both",
    ):
        opened(bases, "llama", tmp_path)


def test_the_adapter_can_be_asked_for_its_files_and_commit(bases, tmp_path):
    adapted(bases, tmp_path, "llama", target_modules=["q_proj"])
    with opened(bases, "llama", tmp_path) as model:
        assert model.directory == bases["llama"][0]
        assert model.adapter.directory == tmp_path
        assert model.adapter.commit is None
        adapter_files = {
            model.adapter.directory / name for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        assert set(model.files) == {*adapter_files, model.directory / "model.safetensors"}


# --- bits ---


@pytest.fixture(scope="module")
def on_base(bases, tmp_path_factory):
    """An adapter, opened with the base that it sits on."""
    folder = tmp_path_factory.mktemp("adapter")
    adapted(bases, folder, "gpt2", target_modules=CONV1D, use_rslora=True)
    with base_of(bases, "gpt2") as base, opened(bases, "gpt2", folder, base=base) as model:
        yield base, model


def base_of(bases, name, adapter=None, **options):
    folder, _ = bases[name]
    return open_checkpoint(str(folder), adapter, label="base", folder=folder, **options)


def test_on_its_own_base_the_delta_is_the_product_alone(on_base):
    base, model = on_base
    for name in model.changes:
        change = model.change_rows(name, 0, 16)
        assert change.any()
        assert torch.equal(model.read_rows(name, 0, 16), base.read_rows(name, 0, 16) + change)


def test_on_another_base_it_is_read_whole(bases, on_base, tmp_path):
    shutil.copytree(bases["gpt2"][0], tmp_path / "copy")
    with open_checkpoint("copy", None, label="base", folder=tmp_path) as base:
        model = opened(bases, "gpt2", on_base[1].adapter.directory, base=base)
    name = next(iter(model.changes))
    assert model.change_rows(name, 0, 16) is None
    assert torch.equal(model.read_rows(name, 0, 16), on_base[1].read_rows(name, 0, 16))
    model.close()


def test_a_base_with_an_adapter_of_its_own_is_another_base(bases, on_base):
    adapter = str(on_base[1].adapter.directory)
    with (
        base_of(bases, "gpt2", adapter) as base,
        opened(bases, "gpt2", on_base[1].adapter.directory, base=base) as model,
    ):
        for name in model.tensors:
            rows = model.tensors[name].matrix[0]
            assert model.change_rows(name, 0, rows) is None
            assert torch.equal(model.read_rows(name, 0, rows), base.read_rows(name, 0, rows))


def test_a_tensor_without_a_change_keeps_its_dtype_and_bits(bases, on_base):
    base, model = on_base
    for name in model.tensors.keys() - model.changes.keys():
        rows = model.tensors[name].matrix[0]
        assert model.change_rows(name, 0, rows) is None
        assert torch.equal(model.read_rows(name, 0, rows), base.read_rows(name, 0, rows))
        assert model.dtype(name) == base.dtype(name)


@given(data=st.data())
def test_bits_do_not_depend_on_how_a_tensor_is_cut(large, data):
    model, tensors = large
    name = data.draw(st.sampled_from(sorted(tensors)))
    cuts = sorted([0, len(tensors[name]), *data.draw(st.lists(st.integers(0, len(tensors[name])), max_size=6))])
    rows = [model.read_rows(name, start, stop) for start, stop in pairwise(cuts)]
    assert torch.equal(torch.cat(rows), tensors[name])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """An adapter on weights of a few blocks, and all it reads."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text("{}")
    save_file({"a.weight": torch.randn(150, 100), "b.weight": torch.randn(150, 200)}, folder / "model.safetensors")
    factors = {"a": (100, 150), "b": (150, 200)}  # in, out: b is stored [in, out]
    write_adapter(
        folder / "adapter",
        {f"{m}.lora_A.weight": torch.randn(4, into) for m, (into, _) in factors.items()}
        | {f"{m}.lora_B.weight": torch.randn(output, 4) for m, (_, output) in factors.items()},
    )
    with open_checkpoint(".", "adapter", label="m", folder=folder) as model:
        yield model, {name: model.read(name) for name in model.tensors}


# --- what is refused ---


def write_adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )


def store(folder, tensors):
    """Stores further tensors in an adapter, or others of the same names."""
    stored = load_file(folder / "adapter_model.safetensors")
    prefixed_tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file({**stored, **prefixed_tensors}, folder / "adapter_model.safetensors")


def rename(folder, old, new):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )


Q = "model.layers.0.self_attn.q_proj"
PAIR = {f"{Q}.lora_A.weight": torch.ones(4, 32), f"{Q}.lora_B.weight": torch.ones(32, 4)}
K = "model.layers.0.self_attn.k_proj"
REFUSED = {
    "another type": (PAIR, {"peft_type": "IA3"}, "is a PEFT adapter of type IA3, not LORA"),
    "prefix tuning": (PAIR, {"peft_type": "PREFIX_TUNING"}, "type PREFIX_TUNING"),
    "no type": (PAIR, {"peft_type": None}, "type None"),
    "DoRA": (PAIR, {"use_dora": True}, "uses DoRA (use_dora), which merger cannot add"),
    "packed experts": (PAIR, {"target_parameters": ["mlp.experts"]}, "LoRA on bare parameters"),
    "activated": (PAIR, {"alora_invocation_tokens": [1]}, "activated LoRA"),
    "replicated layers": (PAIR, {"layer_replication": [[0, 2]]}, "replicated layers"),
    "tokens beyond the table": (
        {**PAIR, "model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
        {"trainable_token_indices": [3, 40]},
        "names token 40, but model.embed_tokens.weight has 40 rows",
    ),
    "more tokens than rows": (
        {**PAIR, "model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
        {"trainable_token_indices": {"embed_tokens": [3]}},
        "trainable_tokens_delta is [2, 32], but adapter_config.json has 1 trainable_token_indices",
    ),
    "tokens that the config does not name": (
        {**PAIR, "model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
        {"trainable_token_indices": {"lm_head": [3, 4]}},
        "has no list of trainable_token_indices for base_model.model.model.embed_tokens",
    ),
    "tokens and LoRA on one table": (
        {
            "model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 32),
            "model.embed_tokens.lora_embedding_A": torch.ones(4, 40),
            "model.embed_tokens.lora_embedding_B": torch.ones(32, 4),
        },
        {"trainable_token_indices": [3]},
        "model.embed_tokens.weight has trainable tokens and LoRA",
    ),
    "bias of B": (PAIR, {"lora_bias": True}, "a bias in lora_B"),
    "PiSSA": (PAIR, {"init_lora_weights": "pissa_niter_4"}, "trained from changed base weights"),
    "LoftQ": (PAIR, {"init_lora_weights": "loftq"}, "trained from changed base weights"),
    "DoRA unsaid": (
        {**PAIR, f"{Q}.lora_magnitude_vector": torch.ones(32)},
        {},
        f"base_model.model.{Q}.lora_magnitude_vector belongs to no tensor of the model",
    ),
    "no such module": (
        {name.replace("layers.0", "layers.7"): t for name, t in PAIR.items()},
        {},
        "belongs to no tensor of the model",
    ),
    "no such saved module": ({"score.weight": torch.ones(2, 32)}, {}, "score.weight belongs to no tensor"),
    "two for one weight": (
        {f"{prefix}{name}": t.clone() for name, t in PAIR.items() for prefix in ("", "text.")},
        {},
        f"and another both belong to {Q}.weight",
    ),
    "two for one saved tensor": (
        {"lm_head.weight": torch.ones(40, 32), "text.lm_head.weight": torch.ones(40, 32)},
        {},
        "and another both belong to lm_head.weight",
    ),
    "A alone": (dict(list(PAIR.items())[:1]), {}, "has lora_A alone"),
    "convolution": (
        {f"{Q}.lora_A.weight": torch.ones(4, 3, 2, 2), f"{Q}.lora_B.weight": torch.ones(8, 4, 1, 1)},
        {},
        "LoRA on a convolution",
    ),
    "factors that do not fit each other": ({**PAIR, f"{Q}.lora_B.weight": torch.ones(32, 3)}, {}, "have no product"),
    "factors that do not fit the weight": (
        {f"{K}.lora_A.weight": torch.ones(4, 32), f"{K}.lora_B.weight": torch.ones(32, 4)},
        {},
        f"B·A is [32, 32], but {K}.weight is [16, 32]",
    ),
    "integers": ({**PAIR, f"{Q}.lora_B.weight": torch.ones(32, 4).int()}, {}, "is quantised"),
    "rank that the config denies": (PAIR, {"r": 8}, "has rank 4, but adapter_config.json says 8"),
    "rank that a pattern denies": (PAIR, {"rank_pattern": {"q_proj": 2}}, "says 2"),
    "patterns that are a list": (PAIR, {"rank_pattern": ["q_proj"]}, "is no JSON object"),
    "a pattern that is no expression": (PAIR, {"alpha_pattern": {"(": 1}}, "missing )"),
    "an endless alpha": (PAIR, {"lora_alpha": 10**400}, "too large"),
    "no alpha": (PAIR, {"lora_alpha": None}, "has no lora_alpha"),
    "a square weight between transposed ones": (
        {**PAIR, f"{K}.lora_A.weight": torch.ones(4, 32), f"{K}.lora_B.weight": torch.ones(16, 4)},
        {"fan_in_fan_out": True},
        f"{Q} is square: adapter_config.json does not tell",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_added_is_one_line(bases, tmp_path, name):
    tensors, config, message = REFUSED[name]
    write_adapter(tmp_path, tensors, **config)
    with pytest.raises(CheckpointError) as caught:
        opened(bases, "llama", tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"math: the adapter {tmp_path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("adapter_config.json", "has no adapter_config.json"), ("adapter_model.safetensors", "has no adapter_model.saf")],
)
def test_half_an_adapter_is_one_line(bases, tmp_path, missing, message):
    write_adapter(tmp_path, PAIR)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        opened(bases, "llama", tmp_path)


def test_an_adapter_in_place_of_a_model_says_how_to_write_it(tmp_path):
    write_adapter(tmp_path / "lora", PAIR, base_model_name_or_path="org/base")
    with pytest.raises(
        CheckpointError, match=r"lora is a PEFT adapter, not a model; write {model: org/base, adapter: lora}"
    ):
        open_checkpoint("lora", None, label="math", folder=tmp_path)
