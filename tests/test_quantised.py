"""Codes that are not decoded are refused as inputs, whatever wrote them; buffers of integers are not."""

import inspect

import pytest
import transformers
from checkpoints import CONFIG, save_headers

from merger.checkpoint.opening import open_checkpoint
from merger.errors import CheckpointError

UP = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts"
NORM = {"model.norm.weight": (8,)}

CODES = {
    "GPTQ": ({f"{UP}.qweight": ("I32", (1, 8)), f"{UP}.scales": (1, 8)}, f"it has {UP}.qweight"),
    "GPTQ, of which only the order is left": ({f"{UP}.g_idx": ("I32", (8,))}, f"it has {UP}.g_idx"),
    "bitsandbytes, 8 bits, by its codes": ({f"{UP}.weight": ("I8", (8, 8))}, f"{UP}.weight is I8"),
    "bitsandbytes, 4 bits": (
        {f"{UP}.weight": ("U8", (32, 1)), f"{UP}.weight.absmax": (1,)}, f"it has {UP}.weight.absmax"
    ),
    "bitsandbytes, 4 bits stored as bfloat16": (
        {f"{UP}.weight": (16, 1), f"{UP}.weight.quant_state.bitsandbytes__nf4": ("U8", (90,))},
        f"it has {UP}.weight.quant_state.bitsandbytes__nf4",
    ),
    "quanto": ({f"{UP}.weight._data": ("I8", (8, 8)), f"{UP}.weight._scale": (8, 1)}, f"{UP}.weight._data is I8"),
    "quanto, packed flat": ({f"{UP}.weight._data": ("U8", (32,))}, f"{UP}.weight._data is U8"),
    "torchao": (
        {"model.layers.0.mlp._up_proj_weight_qdata": ("I8", (8, 8))},
        "it has model.layers.0.mlp._up_proj_weight_qdata",
    ),
    "codes and scales": ({f"{UP}.weight": ("I8", (8, 8)), f"{UP}.scales": (8,)}, f"{UP}.weight is I8"),
    "packed experts in 8 bits": ({f"{EXPERTS}.down_proj": ("I8", (2, 8, 8))}, f"{EXPERTS}.down_proj is I8"),
    "compressed-tensors": (
        {f"{UP}.weight_packed": ("I32", (8, 1)), f"{UP}.weight_scale": (8, 1)}, f"it has {UP}.weight_packed"
    ),
    "EETQ": ({f"{UP}.weight": ("I8", (8, 8)), f"{UP}.weight_scales": (8,)}, f"it has {UP}.weight_scales"),
    "HQQ": ({f"{UP}.W_q": ("U8", (4, 8)), f"{UP}.scale": (8, 1), f"{UP}.zero": (8, 1)}, f"it has {UP}.W_q"),
    "AQLM": ({f"{UP}.codes": ("I16", (8, 1, 1)), f"{UP}.codebooks": (1, 16, 1, 8)}, f"{UP}.codes is I16"),
    "VPTQ": ({f"{UP}.indices": ("I32", (1, 64)), f"{UP}.centroids": (1, 16)}, f"{UP}.indices is I32"),
    "QuIP#": ({f"{UP}.Qidxs": ("I64", (8, 2))}, f"it has {UP}.Qidxs"),
    "ExLlama 2": ({f"{UP}.q_weight": ("I32", (1, 8)), f"{UP}.q_scale": ("I32", (1, 1))}, f"{UP}.q_weight is I32"),
}  # fmt: skip

BUFFERS = {
    "bert.embeddings.position_ids": ("I64", (1, 16)),
    "bn.num_batches_tracked": ("I64", ()),
    "h.0.attn.bias": ("U8", (1, 1, 16, 16)),
    "h.0.attn.causal_mask": ("BOOL", (1, 1, 16, 16)),
    "layers.0.attention.self.relative_position_index": ("I64", (49, 49)),
    "layers.0.attention.self.logit_scale": (4, 1, 1),
    "model.layers.0.mlp.gate.tid2eid": ("I32", (32, 2)),
    "model.layers.0.router.per_expert_scale": (4,),
    "logit_scale": (),
    "rng_state": ("U8", (16,)),
}


def opened(folder, shapes, **config):
    save_headers(folder, {**NORM, **shapes}, {**CONFIG, **config})
    return open_checkpoint(str(folder), None, label="math", folder=folder)


@pytest.mark.parametrize("form", CODES)
def test_codes_are_refused_though_the_config_says_nothing_of_them(tmp_path, form):
    shapes, evidence = CODES[form]

    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, shapes)

    assert str(caught.value) == (
        f"math: is quantised ({evidence}); merge the 16- or 32-bit checkpoint it was made from and quantise the "
        "result, or dequantise it first with the library that quantised it"
    )


@pytest.mark.parametrize("name", BUFFERS)
def test_numbers_that_are_no_codes_are_opened(tmp_path, name):
    with opened(tmp_path, {name: BUFFERS[name]}) as model:
        assert name in model.tensors


@pytest.mark.parametrize(
    ("method", "config"),
    [("fp8", "FineGrainedFP8Config"), ("mxfp4", "Mxfp4Config"), ("compressed-tensors", "CompressedTensorsConfig")],
)
def test_a_method_that_transformers_undoes_comes_with_the_command(tmp_path, method, config):
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, {}, quantization_config={"quant_method": method})

    command = str(caught.value).partition('python -c "')[2].removesuffix('"')
    compile(command, "command", "exec")
    assert f"quantization_config=transformers.{config}(dequantize=True)" in command
    assert f"save_pretrained('{tmp_path}-bf16', save_original_format=False)" in command
    assert "dequantize" in inspect.signature(getattr(transformers, config)).parameters


def test_codes_in_an_adapter_are_refused(tmp_path):
    save_headers(tmp_path / "base", NORM)
    adapter = save_headers(tmp_path / "adapter", {"base_model.model.a.lora_A.weight": ("I8", (2, 8))}, {"r": 2})
    (adapter / "config.json").rename(adapter / "adapter_config.json")
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"the adapter .* is quantised"):
        open_checkpoint("base", "adapter", label="math", folder=tmp_path)
