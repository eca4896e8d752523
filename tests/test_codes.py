"""Quantised inputs are decoded as the libraries decode them, bit for bit in float32, a few rows at a time."""

import json
import shutil
from pathlib import Path

import pytest
import thirty
import torch
import transformers
from checkpoints import CONFIG, llama, load, same_bits, save
from safetensors.torch import save_file

import merger
from merger.checkpoint.opening import open_checkpoint
from merger.demo import tasks as demo_tasks
from merger.errors import CheckpointError
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

TOKENIZER = Path(merger.__file__).parent / "demo" / "models" / "base"
UP = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts"


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def float8(*shape, seed=0):
    return (100 * drawn(*shape, seed=seed)).to(torch.float8_e4m3fn)


def scales(*shape, dtype=torch.float32):
    return (0.001 + drawn(*shape, seed=9).abs() / 1000).to(dtype)


def bytes_of(*shape, seed=0, low=0, high=256):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def opened(folder, tensors, section=None, **options):
    """A checkpoint of these tensors with a norm, and with this section as quantization_config."""
    config = CONFIG if section is None else {**CONFIG, "quantization_config": section}
    save(folder, {**tensors, "model.norm.weight": torch.ones(4)}, config, **options)
    return open_checkpoint(str(folder), None, label="math", folder=folder)


def is_read(model, name, expected):
    """Whether a tensor is read as ``expected``, all of it at once and in runs of rows of every length."""
    assert model.tensors[name].shape == expected.shape
    flat = expected.reshape(-1, expected.shape[-1])
    pieces = [(0, 1), (0, len(flat)), (1, len(flat)), (len(flat) // 3, len(flat) // 3 * 2), (len(flat) - 1, len(flat))]
    return same_bits(model.read(name), expected) and all(
        same_bits(model.read_rows(name, start, stop), flat[start:stop].contiguous()) for start, stop in pieces
    )


# --- 8 bits -----------------------------------------------------------------------------------------


def fp8_by_transformers(codes, scale):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=torch.float32)


SCALES = {
    "blocks": scales(2, 3),
    "bfloat16": scales(2, 3, dtype=torch.bfloat16),
    "one for each row": scales(256, 1),
    "one for all": scales(1, 1),
    "exponents in bytes": bytes_of(2, 3, low=110, high=130),
    "exponents": bytes_of(2, 3, low=110, high=130).view(torch.float8_e8m0fnu),
}


@pytest.mark.parametrize("kind", SCALES)
def test_fp8_is_decoded_as_transformers_does(tmp_path, kind):
    codes, scale = float8(256, 384), SCALES[kind]
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    tensors = {f"{UP}.weight": codes, f"{UP}.weight_scale_inv": scale}
    with opened(tmp_path, tensors, section) as model:
        assert is_read(model, f"{UP}.weight", fp8_by_transformers(codes, scale))
        assert model.tensors.keys() == {f"{UP}.weight", "model.norm.weight"}


def test_a_scale_may_lie_in_another_shard_and_cut_blocks_at_the_edges(tmp_path):
    codes, scale = float8(200, 300), scales(2, 3)
    expected = codes.float() * scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    tensors = {f"{UP}.weight": codes, f"{UP}.weight_scale_inv": scale}
    with opened(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}, shards=3) as model:
        assert len({info.file for info in model.tensors[f"{UP}.weight"].code.parts}) == 2
        assert set(model.files) == set(tmp_path.glob("*.safetensors"))
        assert is_read(model, f"{UP}.weight", expected)


@pytest.mark.parametrize("shape", [(), (1,), (256,)])
def test_a_scale_may_have_no_axes_or_one(tmp_path, shape):
    codes, scale = float8(256, 8), scales(*shape)
    expected = codes.float() * (scale.view(-1, 1) if shape else scale)
    with opened(tmp_path, {f"{UP}.weight": codes, f"{UP}.weight_scale": scale}) as model:
        assert is_read(model, f"{UP}.weight", expected)


def test_packed_experts_in_fp8_have_scales_of_their_own(tmp_path):
    codes, scale = float8(3, 256, 128), scales(3, 2, 1)
    expected = torch.stack([fp8_by_transformers(matrix, grid) for matrix, grid in zip(codes, scale, strict=True)])
    tensors = {f"{EXPERTS}.down_proj": codes, f"{EXPERTS}.down_proj_scale_inv": scale}
    with opened(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}) as model:
        assert is_read(model, f"{EXPERTS}.down_proj", expected)


def test_eight_bits_of_bitsandbytes_are_decoded_in_its_order(tmp_path):
    codes, maxima = bytes_of(16, 8).view(torch.int8), scales(16)
    expected = codes * maxima.view(-1, 1) * 7.874015718698502e-3
    with opened(tmp_path, {f"{UP}.weight": codes, f"{UP}.SCB": maxima}) as model:
        assert is_read(model, f"{UP}.weight", expected)


# --- 4 bits -----------------------------------------------------------------------------------------


def test_mxfp4_of_gpt_oss_is_decoded_as_transformers_does(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes, exponents = bytes_of(3, 10, 2, 16), bytes_of(3, 10, 2, low=100, high=140)
    expected = convert_moe_packed_tensors(codes, exponents, dtype=torch.float32)  # [3, 64, 10]
    tensors = {f"{EXPERTS}.gate_up_proj_blocks": codes, f"{EXPERTS}.gate_up_proj_scales": exponents}
    with opened(tmp_path, tensors, {"quant_method": "mxfp4"}) as model:
        assert is_read(model, f"{EXPERTS}.gate_up_proj", expected)
        assert same_bits(model.read_rows(f"{EXPERTS}.gate_up_proj", 50, 150), expected.flatten(0, 1)[50:150])


# --- compressed-tensors, against the library where it is installed ------------------------------------


def compressed(form, scheme, weight, **companions):
    """The tensors that compressed-tensors stores of a weight, and the float32 weight that it decodes them to."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry(form)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme))
    stored = compressor.compress({"weight": weight, **companions}, scheme)
    decoded = compressor.decompress({**stored}, scheme)["weight"]
    return {f"{UP}.{name}": tensor.contiguous() for name, tensor in stored.items()}, decoded


def section(form, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_packed_integers_are_decoded_as_compressed_tensors_does(tmp_path, bits, symmetric, group_size):
    strategy = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    grid = (16, 128 // (group_size or 128))
    limit = 1 << bits - 1
    zero_point = torch.zeros(grid, dtype=torch.int8)
    if not symmetric:
        zero_point = torch.randint(-limit, limit, grid, generator=torch.Generator().manual_seed(3)).to(torch.int8)
    stored, expected = compressed(
        "pack-quantized", weights, drawn(16, 128) / 50, weight_scale=scales(*grid), weight_zero_point=zero_point
    )
    with opened(tmp_path, stored, section("pack-quantized", **weights)) as model:
        assert is_read(model, f"{UP}.weight", expected)


@pytest.mark.parametrize("form", ["int-quantized", "float-quantized"])
def test_eight_bits_of_compressed_tensors_are_decoded_as_it_does(tmp_path, form):
    weights = {"num_bits": 8, "type": form.partition("-")[0], "symmetric": True, "strategy": "channel"}
    stored, expected = compressed(form, weights, drawn(16, 32) / 50, weight_scale=scales(16, 1))
    with opened(tmp_path, stored, section(form, **weights)) as model:
        assert is_read(model, f"{UP}.weight", expected)


def floats_of_pairs(stored, weights):
    """What compressed-tensors decodes 4-bit floats to, where it computes in float32 and not in bfloat16."""
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed, scale = stored[f"{UP}.weight_packed"], stored[f"{UP}.weight_scale"]
    scale = decompress_mx_scale(scale).float() if scale.dtype == torch.uint8 else scale.float()
    return dequantize(
        unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], torch.float32),
        scale,
        args=QuantizationArgs(**weights),
        global_scale=stored.get(f"{UP}.weight_global_scale"),
    )


@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_packed_floats_are_decoded_as_compressed_tensors_does(tmp_path, form):
    is_nv = form.startswith("nv")
    strategy = {"strategy": "tensor_group", "group_size": 16} if is_nv else {"strategy": "group", "group_size": 32}
    weights = {"num_bits": 4, "type": "float", "symmetric": True, **strategy}
    grid = scales(16, 64 // strategy["group_size"])
    companions = {"weight_scale": (grid * 400).to(torch.float8_e4m3fn).float() if is_nv else grid}
    if is_nv:
        companions["weight_global_scale"] = torch.tensor([300.0])
    stored, _ = compressed(form, weights, drawn(16, 64) / 50, **companions)
    expected = floats_of_pairs(stored, weights)
    with opened(tmp_path, stored, section(form, **weights)) as model:
        assert is_read(model, f"{UP}.weight", expected)


def test_integers_of_four_bits_are_those_of_their_words(tmp_path):
    words = torch.tensor([[0x76543210], [-0x01234568]], dtype=torch.int32)  # the second is 0xFEDCBA98
    stored = {f"{UP}.weight_packed": words, f"{UP}.weight_scale": torch.tensor([[2.0], [0.5]])}
    weights = section("pack-quantized", num_bits=4, type="int", strategy="channel", group_size=None)
    expected = torch.tensor([range(-16, 0, 2), range(8)]).float()
    expected[1] /= 2
    with opened(tmp_path, stored, weights) as model:
        assert is_read(model, f"{UP}.weight", expected)


# --- faults -----------------------------------------------------------------------------------------

CODES = {f"{UP}.weight": float8(4, 8)}
FAULTS = {
    "no scale": (
        CODES,
        f"math: {UP}.weight is F8_E4M3 and has no scale ({UP}.weight_scale_inv or {UP}.weight_scale); download every "
        "shard of the model again",
    ),
    "no codes": (
        {f"{UP}.weight_scale_inv": scales(1, 1)},
        f"math: {UP}.weight_scale_inv is the scale of {UP}.weight, which is not there; download every shard of the "
        "model again",
    ),
    "no scales of MXFP4": (
        {f"{EXPERTS}.down_proj_blocks": bytes_of(2, 4, 1, 16)},
        f"math: {EXPERTS}.down_proj_blocks is U8 and has no scale ({EXPERTS}.down_proj_scales); download every shard "
        "of the model again",
    ),
    "no codes of MXFP4": (
        {f"{EXPERTS}.down_proj_scales": bytes_of(2, 4, 1)},
        f"math: {EXPERTS}.down_proj_scales is the scale of {EXPERTS}.down_proj_blocks, which is not there; download "
        "every shard of the model again",
    ),
    "scales of another shape": (
        {**CODES, f"{UP}.weight_scale_inv": scales(3, 1)},
        f"math: {UP}.weight_scale_inv is [3, 1], which does not fit a weight of [4, 8]",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_codes_and_scales_that_do_not_fit_are_refused(tmp_path, kind):
    tensors, message = FAULTS[kind]
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, tensors)
    assert str(caught.value) == message


# --- merges -----------------------------------------------------------------------------------------


def quantised(tensors):
    """A model whose linear layers are stored in FP8, and the same model decoded."""
    stored, decoded = {}, {}
    for name, tensor in tensors.items():
        stored[name] = decoded[name] = tensor
        if "_proj" in name:
            scale = tensor.abs().max().view(1, 1) / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace("weight", "weight_scale_inv")] = scale
            decoded[name] = stored[name].float() * scale
    return stored, decoded


@pytest.fixture
def family(tmp_path):
    """A base and experts, plain and decoded in `decoded`, the base and `math` quantised in `stored`."""
    config = {**CONFIG, "dtype": "float32"}
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for seed, label in enumerate(("base", "code", "math")):
        stored, decoded = quantised(llama(seed))
        if label == "code":
            stored = decoded
        save(tmp_path / "decoded" / label, decoded, config)
        save(
            tmp_path / "stored" / label,
            stored,
            config if label == "code" else {**config, "quantization_config": section},
        )
    return tmp_path


def recipe(folder, **options):
    content = {"base": "base", "experts": {"code": "code", "math": "math"}, "method": "ties", "output": {"path": "out"}}
    return Recipe.parse({**content, **options}, folder)


def test_quantised_models_merge_as_what_they_decode_to(family):
    for form in ("stored", "decoded"):
        merger.merge(recipe(family / form))
    assert same_bits(load(family / "stored" / "out"), load(family / "decoded" / "out"))
    assert "quantization_config" not in json.loads((family / "stored" / "out" / "config.json").read_text())


def test_a_decoded_tensor_is_written_in_the_dtype_of_the_config(family):
    file = family / "stored" / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    merger.merge(recipe(family / "stored"))
    out = load(family / "stored" / "out")
    assert out[f"{UP}.weight"].dtype == torch.bfloat16
    assert out["model.norm.weight"].dtype == torch.float32


def test_the_plan_and_the_card_say_that_the_output_is_not_quantised(family):
    merge_plan = plan(recipe(family / "stored"))
    merge_plan.close()
    assert [note for note in merge_plan.notes if "quantised" in note] == [
        "base: 14 quantised tensors are decoded as they are read; the output is not quantised",
        "math: 14 quantised tensors are decoded as they are read; the output is not quantised",
    ]
    merger.merge(recipe(family / "stored"))
    assert "llm-compressor" in (family / "stored" / "out" / "README.md").read_text()


def test_an_adapter_on_a_quantised_base_is_its_change(family):
    factors = {"lora_A": drawn(2, 4, seed=1), "lora_B": drawn(8, 2, seed=2)}
    for form in ("stored", "decoded"):
        folder = family / form / "lora"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
        names = {f"base_model.model.{UP}.{key}.weight": tensor for key, tensor in factors.items()}
        save_file(names, folder / "adapter_model.safetensors")
        experts = {"lora": {"model": "base", "adapter": "lora"}}
        merger.merge(recipe(family / form, experts=experts, method="task_arithmetic"))
    assert same_bits(load(family / "stored" / "out"), load(family / "decoded" / "out"))


def test_activation_scales_are_left_out_with_a_note(tmp_path):
    tensors = {
        **CODES,
        f"{UP}.weight_scale": scales(1),
        f"{UP}.input_scale": scales(1),
        "model.layers.0.k_scale": scales(1),
    }
    with opened(tmp_path, tensors) as model:
        assert model.tensors.keys() == {f"{UP}.weight", "model.norm.weight"}
        assert model.remarks[1] == ("math: 2 scales of activations, such as model.layers.0.k_scale, are left out")


# --- models of transformers, as it loads them itself ---------------------------------------------------


def in_fp8(folder, model):
    """Stores a model with its linear layers in FP8, in blocks of 16 by 16."""
    model.save_pretrained(folder)
    stored = load(folder)
    for name, tensor in list(stored.items()):
        if "_proj.weight" in name:
            rows, columns = (-(-size // 16) for size in tensor.shape)
            grid = scales(rows, columns)
            stored[name] = (tensor / grid.repeat_interleave(16, 0)[: len(tensor)].repeat_interleave(16, 1)).to(
                torch.float8_e4m3fn
            )
            stored[f"{name}_scale_inv"] = grid
    config = json.loads((folder / "config.json").read_text())
    section = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    save(folder, stored, {**config, "quantization_config": section})


def in_mxfp4(folder, model):
    """Stores a model of gpt-oss with its experts in MXFP4."""
    model.save_pretrained(folder)
    stored = load(folder)
    for name, tensor in list(stored.items()):
        if tensor.dim() == 3:
            experts, width, height = tensor.shape
            stored[f"{name}_blocks"] = bytes_of(experts, height, width // 32, 16, seed=len(name))
            stored[f"{name}_scales"] = bytes_of(experts, height, width // 32, low=115, high=125)
            del stored[name]
    config = json.loads((folder / "config.json").read_text())
    save(folder, stored, {**config, "quantization_config": {"quant_method": "mxfp4"}})


def dequantise_config(form):
    return {
        in_fp8: transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16)),
        in_mxfp4: transformers.Mxfp4Config(dequantize=True),
    }[form]


TOYS = {
    "llama": (in_fp8, {**thirty.TEXT, "intermediate_size": 48}),
    "gpt_oss": (in_mxfp4, {**thirty.MIXTURE, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}),
}


@pytest.mark.parametrize("name", TOYS)
def test_a_quantised_model_is_read_as_transformers_dequantises_it(tmp_path, name):
    form, settings = TOYS[name]
    kind = getattr(transformers, thirty.MODELS[name][0])
    torch.manual_seed(0)
    form(tmp_path, kind(kind.config_class(**settings)))
    loaded = kind.from_pretrained(tmp_path, quantization_config=dequantise_config(form), dtype=torch.float32)
    with open_checkpoint(str(tmp_path), None, label="math", folder=tmp_path) as model:
        parameters = loaded.state_dict()
        assert model.tensors.keys() <= parameters.keys()
        assert model.is_decoded
        for name in model.tensors:
            assert same_bits(model.read(name).float(), parameters[name])


def test_obim_looks_at_the_inputs_of_quantised_layers(tmp_path):
    kind = transformers.LlamaForCausalLM
    lines = (json.dumps({"text": prompt + answer}) for prompt, answer in demo_tasks.examples("upper", "calibration", 4))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    for seed, label in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        in_fp8(tmp_path / label, kind(kind.config_class(**TOYS["llama"][1])))
        with open_checkpoint(label, None, label=label, folder=tmp_path) as model:
            save(tmp_path / f"{label}.decoded", {name: model.read(name) for name in model.tensors}, model.config)
        for folder in (label, f"{label}.decoded"):
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(TOKENIZER / file, tmp_path / folder)
    outputs = []
    for form in ("", ".decoded"):
        content = {
            "base": f"base{form}",
            "experts": {"a": f"a{form}", "b": f"b{form}"},
            "method": "obim",
            "calibration": {"data": "text.jsonl", "samples": 4},
            "output": {"path": f"out{form}", "dtype": "float32"},
        }
        merger.merge(Recipe.parse(content, tmp_path))
        outputs.append(load(tmp_path / f"out{form}"))
    assert same_bits(*outputs)
