"""The order of the forward pass, told from names, held against models that run."""

import pytest
import torch
import transformers
from architectures import ALL, described

from merger.checkpoint.forward_order import LAYERS, forward_key
from merger.checkpoint.tensor_info import Info
from merger.checkpoint.tensor_kinds import tensor_kinds

SIZE = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "state_size": 4, "time_step_rank": 4,
    "word_embed_proj_dim": 16, "ffn_dim": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "first_k_dense_replace": 2, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "n_inner": 24,
    "rotary_dim": 4,
}  # fmt: skip
MODELS = (
    "LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM", "OPTForCausalLM",
    "GPTJForCausalLM", "FalconForCausalLM", "BloomForCausalLM", "DeepseekV3ForCausalLM", "BertForMaskedLM",
    "RobertaForMaskedLM", "T5ForConditionalGeneration", "BartForConditionalGeneration",
    "MambaForCausalLM", "Starcoder2ForCausalLM",
)  # fmt: skip


def in_forward_order(tensors, config):
    """The linear layers' names, first to last."""
    kinds = tensor_kinds(tensors, config)
    keys = {name: forward_key(name, kinds.kind(name), kinds.unit(name), kinds.rotation(name)) for name in tensors}
    return [name for name in sorted(tensors, key=keys.get) if kinds.kind(name) in LAYERS]


def layers_as_called(model):
    """The names of the weights of a model's linear layers, in the order in which a forward pass calls them."""
    called = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(f"{name}.weight"))
    ids = torch.tensor([[1, 5, 7, 2]])
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return list(called)


@pytest.mark.parametrize("name", MODELS)
def test_names_are_sorted_as_the_model_calls_its_layers(name):
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**SIZE)).eval()
    tensors = {key: Info("F32", tuple(value.shape)) for key, value in model.state_dict().items()}
    config = {**model.config.to_dict(), "architectures": [name]}

    called = layers_as_called(model)  # but for Mamba's dt_proj, whose weight is taken without a call

    ordered = in_forward_order(tensors, config)
    assert [layer for layer in ordered if layer in called] == [layer for layer in called if layer in ordered]


def sorted_names(architecture):
    names = in_forward_order(*described(ALL[architecture], blocks=1))
    return [name.removesuffix(".weight").removeprefix("model.layers.0.") for name in names]


def test_experts_follow_their_router_one_after_another():
    assert sorted_names("qwen2_moe")[1:] == [
        "mlp.gate", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate",
        "mlp.experts.0.gate_proj", "mlp.experts.1.down_proj", "lm_head",
    ]  # fmt: skip


def test_packed_experts_stand_for_all_of_their_slices():
    assert sorted_names("packed experts") == [
        "mlp.router", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "lm_head"
    ]  # fmt: skip


def test_blocks_are_counted_by_number():
    tensors = {f"h.{i}.mlp.{leaf}.weight": Info("F32", (4, 4)) for i in (10, 2) for leaf in ("up_proj", "gate_proj")}

    layers = [name.removesuffix(".weight") for name in in_forward_order(tensors, {})]

    assert layers == ["h.2.mlp.gate_proj", "h.2.mlp.up_proj", "h.10.mlp.gate_proj", "h.10.mlp.up_proj"]
