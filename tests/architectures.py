"""Tensors of well-known architectures as their checkpoints store them: shape, kind, and where those outside blocks are.

A ``*`` stands for the number of a block.
"""

from merger.checkpoint.tensor_info import Info

BEFORE, AFTER = "before the blocks", "after the blocks"


def linear(name, rows, columns, *, bias=True):
    """A linear layer of a block."""
    layer = {f"{name}.weight": ((rows, columns), "linear")}
    return {**layer, f"{name}.bias": ((rows,), "vector")} if bias else layer


def conv1d(name, rows, columns):
    """GPT-2's layer, which is stored [in, out]."""
    return {f"{name}.weight": ((rows, columns), "conv1d"), f"{name}.bias": ((columns,), "vector")}


def norm(name, *position, bias=True):
    """A norm of 8 features."""
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{part}": ((8,), "vector", *position) for part in parts}


GPT2 = {
    "transformer.wte.weight": ((16, 8), "tied", BEFORE),
    "transformer.wpe.weight": ((12, 8), "embedding", BEFORE),
    **norm("transformer.h.*.ln_1"),
    **conv1d("transformer.h.*.attn.c_attn", 8, 24),
    **conv1d("transformer.h.*.attn.c_proj", 8, 8),
    **norm("transformer.h.*.ln_2"),
    **conv1d("transformer.h.*.mlp.c_fc", 8, 32),
    **conv1d("transformer.h.*.mlp.c_proj", 32, 8),
    **norm("transformer.ln_f", AFTER),
}
GPT_NEOX = {
    "gpt_neox.embed_in.weight": ((16, 8), "embedding", BEFORE),
    **norm("gpt_neox.layers.*.input_layernorm"),
    **linear("gpt_neox.layers.*.attention.query_key_value", 24, 8),
    **linear("gpt_neox.layers.*.attention.dense", 8, 8),
    **linear("gpt_neox.layers.*.mlp.dense_h_to_4h", 32, 8),
    **linear("gpt_neox.layers.*.mlp.dense_4h_to_h", 8, 32),
    "gpt_neox.layers.*.attention.masked_bias": ((), "vector"),
    "gpt_neox.layers.*.attention.bias": (("BOOL", (1, 1, 12, 12)), "buffer"),
    "gpt_neox.layers.*.attention.rotary_emb.inv_freq": ((2,), "vector"),
    **norm("gpt_neox.final_layer_norm", AFTER),
    "embed_out.weight": ((16, 8), "head", AFTER),
}
LLAMA_WITH_BIASES = {
    "model.embed_tokens.weight": ((16, 8), "embedding", BEFORE),
    **linear("model.layers.*.self_attn.q_proj", 8, 8),
    **linear("model.layers.*.self_attn.k_proj", 4, 8),
    **linear("model.layers.*.self_attn.v_proj", 4, 8),
    **linear("model.layers.*.self_attn.o_proj", 8, 8),
    **linear("model.layers.*.mlp.gate_proj", 24, 8),
    **linear("model.layers.*.mlp.up_proj", 24, 8),
    **linear("model.layers.*.mlp.down_proj", 8, 24),
    **norm("model.layers.*.input_layernorm", bias=False),
    **norm("model.norm", AFTER, bias=False),
    "lm_head.weight": ((16, 8), "head", AFTER),
}
PHI = {
    "model.embed_tokens.weight": ((16, 8), "embedding", BEFORE),
    **norm("model.layers.*.input_layernorm"),
    **linear("model.layers.*.self_attn.q_proj", 8, 8),
    **linear("model.layers.*.self_attn.dense", 8, 8),
    **linear("model.layers.*.mlp.fc1", 32, 8),
    **linear("model.layers.*.mlp.fc2", 8, 32),
    **norm("model.final_layernorm", AFTER),
    "lm_head.weight": ((16, 8), "head", AFTER),
    "lm_head.bias": ((16,), "vector", AFTER),
}
QWEN2_MOE = {
    "model.embed_tokens.weight": ((16, 8), "embedding", BEFORE),
    **linear("model.layers.*.self_attn.q_proj", 8, 8),
    **linear("model.layers.*.mlp.gate", 2, 8, bias=False),
    **linear("model.layers.*.mlp.experts.0.gate_proj", 6, 8, bias=False),
    **linear("model.layers.*.mlp.experts.1.down_proj", 8, 6, bias=False),
    **linear("model.layers.*.mlp.shared_expert.up_proj", 6, 8, bias=False),
    **linear("model.layers.*.mlp.shared_expert_gate", 1, 8, bias=False),
    **norm("model.norm", AFTER, bias=False),
    "lm_head.weight": ((16, 8), "head", AFTER),
}
PACKED_EXPERTS = {
    "model.embed_tokens.weight": ((16, 8), "embedding", BEFORE),
    **linear("model.layers.*.mlp.router", 3, 8),
    "model.layers.*.mlp.experts.gate_up_proj": ((3, 8, 12), "expert3d"),
    "model.layers.*.mlp.experts.gate_up_proj_bias": ((3, 12), "vector"),
    "model.layers.*.mlp.experts.down_proj": ((3, 6, 8), "expert3d"),
    "model.layers.*.self_attn.sinks": ((2,), "vector"),
    **norm("model.norm", AFTER, bias=False),
    "lm_head.weight": ((16, 8), "head", AFTER),
}
BERT = {
    "bert.embeddings.word_embeddings.weight": ((16, 8), "tied", BEFORE),
    "bert.embeddings.position_embeddings.weight": ((12, 8), "embedding", BEFORE),
    "bert.embeddings.token_type_embeddings.weight": ((2, 8), "embedding", BEFORE),
    "bert.embeddings.position_ids": (("I64", (1, 12)), "buffer", BEFORE),
    **norm("bert.embeddings.LayerNorm", BEFORE),
    **linear("bert.encoder.layer.*.attention.self.query", 8, 8),
    **linear("bert.encoder.layer.*.attention.output.dense", 8, 8),
    **norm("bert.encoder.layer.*.attention.output.LayerNorm"),
    **linear("bert.encoder.layer.*.intermediate.dense", 16, 8),
    **linear("bert.encoder.layer.*.output.dense", 8, 16),
    "cls.predictions.bias": ((16,), "vector", AFTER),
    "cls.predictions.transform.dense.weight": ((8, 8), "linear", AFTER),
    **norm("cls.predictions.transform.LayerNorm", AFTER),
}
BERT_CLASSIFIER = {
    "bert.embeddings.word_embeddings.weight": ((16, 8), "embedding", BEFORE),
    **linear("bert.encoder.layer.*.output.dense", 8, 16),
    "bert.pooler.dense.weight": ((8, 8), "linear", AFTER),
    "classifier.weight": ((2, 8), "head", AFTER),
    "classifier.bias": ((2,), "vector", AFTER),
}
VIT = {
    "vit.embeddings.cls_token": ((1, 1, 8), "other", BEFORE),
    "vit.embeddings.position_embeddings": ((1, 5, 8), "other", BEFORE),
    "vit.embeddings.patch_embeddings.projection.weight": ((8, 3, 4, 4), "other", BEFORE),
    "vit.embeddings.patch_embeddings.projection.bias": ((8,), "vector", BEFORE),
    **linear("vit.encoder.layer.*.attention.attention.query", 8, 8),
    **linear("vit.encoder.layer.*.intermediate.dense", 16, 8),
    **norm("vit.encoder.layer.*.layernorm_before"),
    **norm("vit.layernorm", AFTER),
    "classifier.weight": ((2, 8), "head", AFTER),
    "classifier.bias": ((2,), "vector", AFTER),
}
WHISPER = {
    "model.decoder.embed_tokens.weight": ((16, 8), "tied", BEFORE),
    "model.decoder.embed_positions.weight": ((12, 8), "embedding", BEFORE),
    "model.encoder.embed_positions.weight": ((20, 8), "embedding", BEFORE),
    **linear("model.encoder.layers.*.self_attn.k_proj", 8, 8, bias=False),
    **linear("model.encoder.layers.*.fc1", 32, 8),
    **linear("model.decoder.layers.*.encoder_attn.out_proj", 8, 8),
    **norm("model.decoder.layers.*.encoder_attn_layer_norm"),
    **norm("model.encoder.layer_norm", AFTER),
    **norm("model.decoder.layer_norm", AFTER),
}
T5 = {
    "shared.weight": ((16, 8), "tied", BEFORE),
    **linear("encoder.block.*.layer.0.SelfAttention.q", 8, 8, bias=False),
    "encoder.block.*.layer.0.SelfAttention.relative_attention_bias.weight": ((32, 2), "embedding"),
    **linear("decoder.block.*.layer.2.DenseReluDense.wo", 8, 16, bias=False),
    "decoder.final_layer_norm.weight": ((8,), "vector", AFTER),
}
MAMBA = {
    "backbone.embeddings.weight": ((16, 8), "tied", BEFORE),
    **linear("backbone.layers.*.mixer.in_proj", 32, 8, bias=False),
    "backbone.layers.*.mixer.A_log": ((16, 4), "other"),
    "backbone.layers.*.mixer.D": ((16,), "vector"),
    "backbone.layers.*.mixer.conv1d.weight": ((16, 1, 4), "other"),
    "backbone.norm_f.weight": ((8,), "vector", AFTER),
}

ALL = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", GPT_NEOX),
    "llama with biases": ("LlamaForCausalLM", LLAMA_WITH_BIASES),
    "phi": ("PhiForCausalLM", PHI),
    "qwen2_moe": ("Qwen2MoeForCausalLM", QWEN2_MOE),
    "packed experts": ("GptOssForCausalLM", PACKED_EXPERTS),
    "bert": ("BertForMaskedLM", BERT),
    "bert classifier": ("BertForSequenceClassification", BERT_CLASSIFIER),
    "vit": ("ViTForImageClassification", VIT),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
    "t5": ("T5ForConditionalGeneration", T5),
    "mamba": ("MambaForCausalLM", MAMBA),
}


def config(architecture):
    """The part of config.json that tells what the tensors are."""
    name, tensors = architecture
    ties = any(row[1] == "tied" for row in tensors.values()) or name.startswith("Bert")
    return {"architectures": [name], "vocab_size": 16, "tie_word_embeddings": ties}


def expanded(architecture, blocks):
    """Every tensor's name, its row of the table, its block's number, and its block."""
    for pattern, row in architecture[1].items():
        for i in range(blocks) if "*" in pattern else (None,):
            name = pattern.replace("*", str(i))
            yield name, row, i, name if i is None else f"{pattern.partition('.*')[0]}.{i}"


def shapes(architecture, blocks=2):
    """What a header says: a shape, or a dtype and a shape."""
    return {name: row[0] for name, row, *_ in expanded(architecture, blocks)}


def described(architecture, blocks=2):
    """The header's tensors and the config, as they are studied."""
    tensors = {
        name: Info(*(entry if entry and isinstance(entry[0], str) else ("BF16", entry)))
        for name, entry in shapes(architecture, blocks).items()
    }
    return tensors, config(architecture)


def expected(architecture, column, blocks=2):
    """For every tensor its kind, its unit, or where it is: a block's number, BEFORE or AFTER."""
    return {
        name: {"kind": row[1], "unit": unit, "where": row[2] if i is None else i}[column]
        for name, row, i, unit in expanded(architecture, blocks)
    }
