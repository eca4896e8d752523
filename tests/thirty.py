"""Thirty architectures of transformers in sizes that a test can make, with random weights."""

import torch
import transformers

TEXT = {
    "vocab_size": 58, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MIXTURE = {
    **TEXT, "num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
}  # fmt: skip
DEEPSEEK = {
    **TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_shared_experts": 1, "head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 24,
    "patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1, "fullatt_block_indexes": [0],
}  # fmt: skip
QWEN_TEXT = {
    **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}  # fmt: skip
TOKENS = {"image_token_id": 54, "video_token_id": 55, "vision_start_token_id": 56, "vision_end_token_id": 57}
MODELS = {
    "llama": ("LlamaForCausalLM", TEXT),
    "mistral": ("MistralForCausalLM", TEXT),
    "qwen2": ("Qwen2ForCausalLM", TEXT),
    "qwen3": ("Qwen3ForCausalLM", TEXT),
    "gemma2": ("Gemma2ForCausalLM", TEXT),
    "gemma3_text": ("Gemma3ForCausalLM", TEXT),
    "phi": ("PhiForCausalLM", TEXT),
    "phi3": ("Phi3ForCausalLM", TEXT),
    "olmo2": ("Olmo2ForCausalLM", TEXT),
    "granite": ("GraniteForCausalLM", TEXT),
    "cohere": ("CohereForCausalLM", TEXT),
    "glm4": ("Glm4ForCausalLM", TEXT),
    "starcoder2": ("Starcoder2ForCausalLM", TEXT),
    "stablelm": ("StableLmForCausalLM", TEXT),
    "falcon": ("FalconForCausalLM", {k: v for k, v in TEXT.items() if k != "head_dim"}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 58, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 58, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "mamba": ("MambaForCausalLM", {"vocab_size": 58, "hidden_size": 16, "num_hidden_layers": 2}),
    "mixtral": ("MixtralForCausalLM", MIXTURE),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**MIXTURE, "shared_expert_intermediate_size": 8}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MIXTURE),
    "olmoe": ("OlmoeForCausalLM", MIXTURE),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "granitemoe": ("GraniteMoeForCausalLM", MIXTURE),
    "jetmoe": ("JetMoeForCausalLM", {**MIXTURE, "kv_channels": 8}),
    "gpt_oss": ("GptOssForCausalLM", MIXTURE),
    "llama4": ("Llama4ForCausalLM", {**MIXTURE, "intermediate_size_mlp": 20}),
    "bert": ("BertForMaskedLM", TEXT),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 58, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    ),
    "vit": ("ViTForImageClassification", VISION),
    "clip": (
        "CLIPModel",
        {"text_config": {**TEXT, "hidden_size": 16}, "vision_config": VISION, "projection_dim": 8},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 57,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "gemma3_text"},
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": 57,
            "boi_token_index": 55,
            "eoi_token_index": 56,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {"text_config": QWEN_TEXT, "vision_config": QWEN_VISION, **TOKENS},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": QWEN_TEXT, "vision_config": QWEN_VISION, **TOKENS},
    ),
}  # fmt: skip


def build(name, seed):
    """A model of one of the `MODELS`; every parameter is drawn anew, for some start at zero or at one."""
    class_name, settings = MODELS[name]
    kind = getattr(transformers, class_name)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model
