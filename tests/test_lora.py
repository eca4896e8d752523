"""`merger lora`: a fine-tune as an adapter, against peft, merger's own reader of adapters, and the SVD."""

import hashlib
import json

import pytest
import torch
from checkpoints import load
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import merger
from merger.errors import CheckpointError, RecipeError

# peft asks transformers for what it calls by another name today
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LLAMA = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=False)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}


def fine_tune(folder, kind, *, rank=None, only="weight"):
    """A model in `base`, and in `tuned` the same with its weights moved, by a product of that rank if it is given."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if only not in name:
                continue
            if value.dim() < 2 or rank is None:
                value += 0.02 * torch.randn_like(value)
            else:
                value += 0.02 * torch.randn(value.shape[0], rank) @ torch.randn(rank, value.shape[1])
    model.save_pretrained(folder / "tuned")


def extract(folder, **arguments):
    return merger.extract_lora(str(folder / "base"), str(folder / "tuned"), folder / "adapter", **arguments)


def matrices(base, tuned):
    """The changes of all linear layers, which an adapter can hold."""
    return {name: tuned[name] - base[name] for name in base if ".mlp." in name or "proj" in name or "attn.c_" in name}


@pytest.mark.parametrize("kind", MODELS)
def test_peft_loads_the_adapter_and_makes_of_it_what_merger_does(tmp_path, kind):
    fine_tune(tmp_path, kind)
    extract(tmp_path, rank=3)
    model = MODELS[kind]().from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    expert = {"model": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter")}
    content = {"base": str(tmp_path / "base"), "experts": {"a": expert}, "method": "linear"}
    merger.merge(merger.Recipe.parse({**content, "output": {"path": str(tmp_path / "out")}}))
    base = load(tmp_path / "base")
    for name, value in load(tmp_path / "out").items():
        torch.testing.assert_close(value, peft[name], rtol=0, atol=1e-6, msg=name)
    assert any(not torch.equal(value, base[name]) for name, value in load(tmp_path / "out").items())


def test_the_error_is_what_the_smallest_singular_values_are_beside_all(tmp_path):
    fine_tune(tmp_path, "llama", only="proj")
    extraction = extract(tmp_path, rank=3)
    changes = matrices(load(tmp_path / "base"), load(tmp_path / "tuned"))
    omitted, total = 0.0, 0.0
    for layer, summary in extraction.layers.items():
        squares = [torch.linalg.svdvals(c.double()).square() for name, c in changes.items() if name.startswith(layer)]
        if not squares:  # the head did not change
            continue
        omitted_square, total_square = (
            sum(float(square[3:].sum()) for square in squares),
            sum(float(square.sum()) for square in squares),
        )
        assert summary.error == pytest.approx((omitted_square / total_square) ** 0.5, rel=1e-4)
        assert (summary.matrices, summary.ranks) == (7, (3, 3))
        omitted, total = omitted + omitted_square, total + total_square
    assert extraction.error == extraction.whole_error == pytest.approx((omitted / total) ** 0.5, rel=1e-4)
    assert extraction.left_out == {}


def test_a_change_of_low_rank_is_kept_whole(tmp_path):
    fine_tune(tmp_path, "llama", rank=2, only="proj")
    assert extract(tmp_path, rank=2).whole_error < 1e-5


def test_energy_chooses_the_least_rank_that_holds_it(tmp_path):
    fine_tune(tmp_path, "llama", only="proj")
    extraction = extract(tmp_path, energy=0.9)
    changes = matrices(load(tmp_path / "base"), load(tmp_path / "tuned"))
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, change in changes.items():
        energies = torch.linalg.svdvals(change.double()).square().cumsum(0)
        rank = 1 + int((energies < 0.9 * energies[-1]).sum())
        assert len(factors[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"]) == rank
    assert extraction.error <= 0.1**0.5
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    merged, tuned = peft.merge_and_unload().state_dict(), load(tmp_path / "tuned")
    distance = sum((merged[name] - tuned[name]).square().sum() for name in changes)
    total = sum(change.square().sum() for change in changes.values())
    assert float((distance / total).sqrt()) == pytest.approx(extraction.error, rel=1e-4)


def test_what_is_no_matrix_is_left_out_and_told(tmp_path):
    fine_tune(tmp_path, "tied")
    extraction = extract(tmp_path, rank=16)
    assert set(extraction.left_out) == {
        "model.embed_tokens.weight",
        *(n for n in load(tmp_path / "base") if "norm" in n),
    }
    assert extraction.error < 1e-5
    assert extraction.whole_error == pytest.approx(sum(extraction.left_out.values()) ** 0.5, rel=1e-4)


def test_a_matrix_that_did_not_change_gets_factors_of_nothing(tmp_path):
    fine_tune(tmp_path, "llama", only="q_proj")
    extract(tmp_path, rank=2)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not factors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].any()
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_nothing_is_left_where_it_fails(tmp_path):
    fine_tune(tmp_path, "llama")
    weights = load(tmp_path / "tuned")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, 0] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model: {name} holds NaN"):
        extract(tmp_path, rank=2)
    assert not list(tmp_path.glob("adapter*"))


def unfinished(folder, plan):
    """What a run of this plan leaves beside `adapter` when it is stopped after one shard."""
    (folder / "adapter.partial" / "model").mkdir(parents=True)
    (folder / "adapter.partial" / "model" / "one.safetensors").write_bytes(b"one shard")
    line = {"shard": "one.safetensors", "sha256": hashlib.sha256(b"one shard").hexdigest(), "notes": []}
    journal = "".join(json.dumps(entry) + "\n" for entry in ({"plan": plan}, line))
    (folder / "adapter.partial" / "journal").write_text(journal)


def test_finished_shards_of_a_suspended_merge_are_refused_and_left_alone(tmp_path):
    fine_tune(tmp_path, "llama", only="proj")
    unfinished(tmp_path, {"recipe": "1"})
    files_before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match=r"adapter\.partial: holds 1 finished shard of another merge"):
        extract(tmp_path, rank=2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files_before


def test_a_folder_of_someone_that_ends_in_partial_is_left_alone(tmp_path):
    fine_tune(tmp_path, "llama", only="proj")
    (tmp_path / "adapter.partial").mkdir()
    (tmp_path / "adapter.partial" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"adapter\.partial: .*no run of merger left it; move it away"):
        extract(tmp_path, rank=2)
    assert (tmp_path / "adapter.partial" / "notes.txt").read_text() == "mine"


def test_force_forgets_the_finished_shards_of_a_suspended_merge(tmp_path):
    fine_tune(tmp_path, "llama", only="proj")
    unfinished(tmp_path, {"recipe": "1"})
    extract(tmp_path, rank=2, force=True)
    assert sorted(path.name for path in tmp_path.glob("adapter*/**/*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_what_a_killed_extraction_left_is_cleared_away(tmp_path):
    fine_tune(tmp_path, "llama", only="proj")
    (tmp_path / "adapter.partial" / "model").mkdir(parents=True)
    (tmp_path / "adapter.partial" / "journal").write_text('{"plan": {"base": "1"}}\n')
    (tmp_path / "adapter.partial" / "model" / "adapter_model.safetensors").write_bytes(b"half")
    extract(tmp_path, rank=2)
    assert [path.name for path in tmp_path.glob("adapter*")] == ["adapter"]


def test_an_occupied_folder_is_refused_and_replaced_by_force(tmp_path):
    fine_tune(tmp_path, "llama", only="proj")
    extract(tmp_path, rank=1)
    with pytest.raises(RecipeError, match="is there already"):
        extract(tmp_path, rank=2)
    extract(tmp_path, rank=2, force=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert not list(tmp_path.glob("adapter.*"))


def test_models_of_other_shapes_are_refused(tmp_path):
    fine_tune(tmp_path, "llama")
    MODELS["tied"]().save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"model: has no lm_head\.weight"):
        merger.extract_lora(str(tmp_path / "base"), str(tmp_path / "other"), tmp_path / "adapter", rank=2)
