"""Statistics taken block by block, held against hooks on the whole model."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merger.calibration import Settings, collect, collect_all
from merger.calibration.samples import pad_samples
from merger.checkpoint.opening import open_checkpoint
from merger.errors import CheckpointError

VOCABULARY = 96
LENGTHS = (20, 20, 17, 9, 8, 8, 3, 20, 12)
SAMPLES = [
    tuple(torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n + i)).tolist())
    for i, n in enumerate(LENGTHS)
]
SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 56, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZE, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
SLIDING = {
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

MODELS = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama-tied": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", SIZE),
    "neox": ("GPTNeoXForCausalLM", SIZE),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 40}),
    "phi": ("PhiForCausalLM", SIZE),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "bert": ("BertForMaskedLM", SIZE),
    "roberta": ("RobertaModel", SIZE),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, **SLIDING}),
    "gpt-oss": ("GptOssForCausalLM", {**GROUPED, **SLIDING, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "albert": ("AlbertForMaskedLM", {**SIZE, "embedding_size": 16}),  # one block, called three times
}
HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
ODD = {
    "deberta": (
        "DebertaV2ForMaskedLM",
        {**SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        {
            **GROUPED, "num_hidden_layers": 4, "layers_block_type": HYBRID, "mamba_d_state": 4, "mamba_headdim": 8,
            "n_mamba_heads": 8, "mamba_ngroups": 1, "num_mem_blocks": 1, "adapter_rank": 4,
        },
    ),
}  # fmt: skip
every = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Makes a tiny model and its checkpoint, once."""

    @functools.cache
    def build(name):
        torch.manual_seed(0)
        class_name, settings = (MODELS | ODD)[name]
        kind = getattr(transformers, class_name)
        model = kind(kind.config_class(**settings)).eval()
        for parameter_name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in parameter_name.lower() and parameter_name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, offset, 0.15)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return model, folder

    return build


def opened(folder):
    return open_checkpoint(str(folder), None, label="math", folder=Path("/"))


def group_by_length(size):
    """All samples in batches of this many, padded to the longest."""
    return [pad_samples(SAMPLES[i : i + size]) for i in range(0, len(SAMPLES), size)]


def collected(folder, size=4, settings=None, **options):
    return collect_all(opened(folder), group_by_length(size), settings or Settings(), **options)


@functools.cache
def inputs_by_hooks(model):
    """What enters each linear layer of the whole model, sample by sample: {parameter: [[n i], ...]}."""
    inputs = {}

    def see(name, rows):
        inputs.setdefault(name, []).append(rows.detach().reshape(-1, rows.shape[-1]).double())

    def experts(name, module, args):
        hidden, routes = args[:2]
        for expert, (up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
            rows = hidden[(routes == expert).any(-1)]
            projected = rows @ up + module.gate_up_proj_bias[expert] if up.shape[0] == rows.shape[1] else rows @ up.T
            see(f"{name}.{expert}.gate_up_proj", rows)
            see(f"{name}.{expert}.down_proj", module._apply_gate(projected))
            assert down.dim() == 2

    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
            module.register_forward_pre_hook(functools.partial(experts, name))
        elif (
            isinstance(module, torch.nn.Linear)
            or type(module).__name__ == "Conv1D"
            or "Router" in type(module).__name__
        ):
            module.register_forward_pre_hook(lambda m, args, name=name: see(f"{name}.weight", args[0]))
    with torch.no_grad():
        for sample in SAMPLES:
            model(input_ids=torch.tensor([sample]), attention_mask=torch.ones(1, len(sample), dtype=torch.long))
    return inputs


def stored_names(name, moments):
    """A parameter's names in the checkpoint, with the slice that it is of one."""
    if name in moments:
        return [(name, None)]
    prefix, _, leaf = name.rpartition(".")
    if leaf in ("gate_up_proj", "down_proj"):  # packed: in the checkpoint too, or one by one
        module, _, expert = prefix.rpartition(".")
        if f"{module}.{leaf}" in moments:
            return [(f"{module}.{leaf}", int(expert))]
        leaves = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else ["down_proj"]
        return [(f"{prefix}.{part}.weight", None) for part in leaves]
    if "embed_out.weight" in moments:  # GPT-NeoX's own name for its head
        return [("embed_out.weight", None)]
    return [(tied, None) for tied in moments if moments[tied].token_share is not None]


def assert_close(result, expected, tolerance=1e-5):
    scale = expected.abs().max().clamp(min=1e-30)
    assert ((result.double() - expected).abs().max() / scale) <= tolerance


# --- the same as the whole model ------------------------------------------------------------------


@every
@pytest.mark.parametrize("size", [1, 4, 9])
def test_blocks_give_what_hooks_on_the_whole_model_see(build, name, size):
    model, folder = build(name)
    notices = []
    moments = collected(folder, size, notice=notices.append)
    for parameter, rows in inputs_by_hooks(model).items():
        rows = torch.cat(rows)
        for stored, slot in stored_names(parameter, moments):
            statistics = [moments[stored].count, moments[stored].second_moment, moments[stored].mean]
            count, second_moment, mean = statistics if slot is None else [statistic[slot] for statistic in statistics]
            assert count == len(rows)
            if len(rows):
                assert_close(second_moment, rows.square().mean(0))
                assert_close(mean, rows.mean(0))
    assert bool(notices) == (name == "albert")


@every
def test_every_matrix_of_the_checkpoint_has_statistics(build, name):
    _, folder = build(name)
    moments = collected(folder, notice=lambda text: None)
    tensors = opened(folder).tensors
    matrices = {key for key, info in tensors.items() if len(info.shape) > 1 and not key.endswith("_bias")}
    positions = {key for key in matrices if "wpe" in key or "position_emb" in key or "token_type" in key}
    assert set(moments) == matrices - positions


@every
def test_batches_and_padding_change_nothing(build, name):
    _, folder = build(name)
    single, batched = (collected(folder, size, notice=lambda text: None) for size in (1, len(SAMPLES)))
    for key, moments in single.items():
        assert torch.equal(moments.count, batched[key].count)
        if moments.second_moment is not None:
            assert_close(batched[key].second_moment, moments.second_moment.double(), 1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2-moe", "bert"])
@pytest.mark.parametrize("skip", [0, 3])
def test_a_sample_can_count_as_one_and_first_tokens_not_at_all(build, name, skip):
    model, folder = build(name)
    moments = collected(folder, 4, Settings(weighting="sample", skip_first_tokens=skip))
    parameter = next(key for key in inputs_by_hooks(model) if key.endswith(("o_proj.weight", "output.dense.weight")))
    rows = [sample[skip:] for sample in inputs_by_hooks(model)[parameter] if len(sample) > skip]
    assert moments[parameter].count == sum(map(len, rows))
    assert_close(moments[parameter].second_moment, torch.stack([sample.square().mean(0) for sample in rows]).mean(0))


def test_samples_count_as_one_among_the_tokens_routed_to_an_expert(build):
    _, folder = build("qwen2-moe")
    single, batched = (
        collected(folder, size, Settings(weighting="sample", skip_first_tokens=2)) for size in (1, len(SAMPLES))
    )
    routed = [name for name in single if ".experts." in name]
    assert routed
    for name in routed:
        assert torch.equal(single[name].count, batched[name].count)
        assert_close(batched[name].second_moment, single[name].second_moment.double())


def test_the_gram_matrix_is_of_the_inputs_and_its_diagonal_their_second_moment(build):
    model, folder = build("gpt2")
    moments = collected(folder, 4, gram=True)
    for name in ("transformer.h.1.attn.c_attn.weight", "transformer.h.2.mlp.c_proj.weight"):
        rows = torch.cat(inputs_by_hooks(model)[name])
        assert_close(moments[name].gram, rows.T @ rows / len(rows))
        assert_close(moments[name].gram.diagonal(), moments[name].second_moment.double())


def test_packed_experts_have_a_gram_matrix_each(build):
    _, folder = build("gpt-oss")
    moments = collected(folder, gram=True)["model.layers.0.mlp.experts.down_proj"]
    assert moments.gram.shape == (5, 56, 56)
    assert_close(moments.gram.diagonal(dim1=1, dim2=2), moments.second_moment.double())


# --- heads and embeddings -------------------------------------------------------------------------


def test_a_tied_head_is_known_by_the_name_of_the_embedding(build):
    model, folder = build("llama-tied")
    moments = collected(folder)["model.embed_tokens.weight"]
    assert_close(moments.second_moment, torch.cat(inputs_by_hooks(model)["lm_head.weight"]).square().mean(0))
    assert moments.token_share is not None


@pytest.mark.parametrize("settings", [Settings(), Settings(weighting="sample", skip_first_tokens=3)])
def test_the_embedding_has_the_share_of_each_token(build, settings):
    _, folder = build("llama")
    moments = collected(folder, settings=settings)["model.embed_tokens.weight"]
    expected = torch.zeros(VOCABULARY, dtype=torch.float64)
    for sample in SAMPLES:
        tokens = sample[settings.skip_first_tokens :]
        for token in tokens:
            expected[token] += 1 / len(tokens) if settings.weighting == "sample" else 1
    assert_close(moments.token_share, expected / expected.sum())
    assert moments.second_moment is None


# --- one block at a time --------------------------------------------------------------------------


class Recorded:
    """A checkpoint that notes which tensors are read."""

    def __init__(self, checkpoint):
        self.label, self.directory, self.tensors = checkpoint.label, checkpoint.directory, checkpoint.tensors
        self.config, self.equal = checkpoint.config, checkpoint.equal
        self.original_names = checkpoint.original_names
        self.reads = []
        self._read = checkpoint.read

    def read(self, name):
        self.reads.append(name)
        return self._read(name)


def test_a_block_is_read_when_its_turn_comes_and_every_tensor_once(build):
    checkpoint = Recorded(opened(build("qwen2-moe")[1]))
    blocks = collect(checkpoint, group_by_length(4), Settings())
    for index in range(3):
        unit, moments = next(blocks)
        assert unit == f"model.layers.{index}"
        assert {name.split(".")[2] for name in moments} == {str(index)}
        assert not any(name.startswith(f"model.layers.{index + 1}.") for name in checkpoint.reads)
    unit, moments = next(blocks)
    assert (unit, set(moments)) == ("", {"lm_head.weight", "model.embed_tokens.weight"})
    assert sorted(checkpoint.reads) == sorted(set(checkpoint.tensors) - {"lm_head.weight"})


def test_hidden_states_can_wait_in_files(build):
    _, folder = build("llama")
    in_memory, in_files = collected(folder), collected(folder, hidden_memory=0)
    assert all(torch.equal(in_memory[name].count, in_files[name].count) for name in in_memory)
    assert all(
        torch.equal(in_memory[name].second_moment, in_files[name].second_moment)
        for name in in_memory
        if in_memory[name].second_moment is not None
    )


def test_progress_is_told_for_each_block_and_batch(build):
    calls = []
    collected(build("llama")[1], 4, progress=lambda count, total: calls.append((count, total)))
    assert calls == [(count, 9) for count in range(1, 10)]


@pytest.mark.parametrize(("merged", "finished", "total"), [(True, 0, 18), (True, 1, 15), (False, 1, 9)])
def test_progress_counts_every_pass_through_a_block(build, merged, finished, total):
    folder, calls = build("llama")[1], []
    collected(
        folder,
        4,
        merged_weights=opened(folder) if merged else None,
        finished_units=[f"model.layers.{block}" for block in range(finished)],
        progress=lambda count, total: calls.append((count, total)),
    )
    assert calls == [(count, total) for count in range(1, total + 1)]


def test_a_model_that_cannot_be_run_block_by_block_runs_whole_and_says_so(build):
    notices = []
    collected(build("albert")[1], notice=notices.append)
    assert len(notices) == 1
    assert "math: its blocks cannot be run one at a time" in notices[0]


def test_blocks_that_share_weights_run_whole_and_all_their_inputs_count(build):
    notices = []
    moments = collected(build("zamba2")[1], notice=notices.append)
    assert "its blocks share weights" in notices[0]
    assert moments["model.layers.1.shared_transformer.self_attn.q_proj.weight"].count == 2 * sum(LENGTHS)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of DeBERTa's own code
def test_a_table_of_positions_through_the_same_matrix_is_no_token(build):
    single, batched = (collected(build("deberta")[1], size) for size in (1, len(SAMPLES)))
    name = "deberta.encoder.layer.1.attention.self.query_proj.weight"
    assert single[name].count == batched[name].count == sum(LENGTHS)
    assert_close(batched[name].second_moment, single[name].second_moment.double(), 1e-6)


def test_half_precision_is_close(build):
    _, folder = build("qwen2-moe")
    exact, rough = collected(folder), collected(folder, dtype=torch.bfloat16)
    assert set(exact) == set(rough)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert_close(rough[name].second_moment, exact[name].second_moment.double(), 0.05)


def test_names_without_the_base_models_prefix_are_kept(build, tmp_path):
    _, folder = build("gpt2")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    expected = collected(folder)
    blocks = dict(collect(opened(tmp_path), group_by_length(4), Settings()))
    assert list(blocks) == ["h.0", "h.1", "h.2", ""]
    assert torch.equal(
        blocks["h.1"]["h.1.mlp.c_fc.weight"].second_moment, expected["transformer.h.1.mlp.c_fc.weight"].second_moment
    )


def test_importing_waits_for_neither_torch_nor_transformers():
    modules = "merger.calibration, merger.calibration.statistics_files"
    code = f"import sys, {modules}; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --- what is wrong with a model -------------------------------------------------------------------


def changed(folder, to, config=None, **tensors):
    """A copy of a checkpoint with some tensors replaced, or left out where None is given."""
    stored = load_file(folder / "model.safetensors") | {
        name.replace("__", "."): tensor for name, tensor in tensors.items()
    }
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | (config or {})))
    return to


def refusal(folder, **options):
    with pytest.raises(CheckpointError) as error:
        collected(folder, **options)
    return str(error.value)


def test_an_activation_that_is_not_finite_names_the_expert_and_the_layer(build, tmp_path):
    weight = torch.full((32,), float("nan"))
    folder = changed(build("llama")[1], tmp_path, model__layers__1__post_attention_layernorm__weight=weight)
    assert refusal(folder).startswith("math: what enters model.layers.1.mlp.gate_proj.weight is not finite")


def test_a_tensor_that_the_model_needs_is_missed_by_name(build, tmp_path):
    folder = changed(build("llama")[1], tmp_path, model__layers__2__mlp__up_proj__weight=None)
    assert refusal(folder) == "math: model.layers.2.mlp.up_proj.weight is not in the checkpoint, but its model needs it"


def test_a_tensor_of_another_shape_is_refused(build, tmp_path):
    folder = changed(build("llama")[1], tmp_path, model__layers__2__mlp__up_proj__weight=torch.zeros(57, 32))
    assert "up_proj.weight is (57, 32) in the checkpoint, but (56, 32) in the model" in refusal(folder)


def test_tokens_beyond_the_embedding_are_refused(build):
    with pytest.raises(CheckpointError, match=r"gives token 96, but model.embed_tokens.weight has 96 rows"):
        collect_all(opened(build("llama")[1]), [pad_samples([(3, 96)])], Settings())


def test_samples_are_cut_to_the_positions_that_the_model_has(build):
    checkpoint, notices = opened(build("gpt2")[1]), []
    sample = (SAMPLES[0] * 4)[:70]
    moments = collect_all(checkpoint, [pad_samples([sample])], Settings(), notice=notices.append)
    expected = collect_all(checkpoint, [pad_samples([sample[:64]])], Settings())
    name = "transformer.h.2.attn.c_attn.weight"
    assert torch.equal(moments[name].second_moment, expected[name].second_moment)
    assert notices == ["math: samples are cut to 64 tokens, the positions that the model has"]


def test_an_unknown_architecture_is_refused(build, tmp_path):
    folder = changed(build("llama")[1], tmp_path, config={"model_type": "made-up", "architectures": ["MadeUp"]})
    assert "math: transformers cannot read its config.json" in refusal(folder)


def test_an_encoder_decoder_is_refused(build, tmp_path):
    folder = changed(build("llama")[1], tmp_path, config={"model_type": "t5", "is_encoder_decoder": True})
    assert "math: t5 has an encoder and a decoder" in refusal(folder)


REMOTE = """
import transformers
class MineConfig(transformers.LlamaConfig):
    model_type = "mine"
class MineForCausalLM(transformers.LlamaForCausalLM):
    config_class = MineConfig
"""


def test_remote_code_runs_only_where_it_is_trusted(build, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    auto_map = {"AutoConfig": "code.MineConfig", "AutoModelForCausalLM": "code.MineForCausalLM"}
    config = {"model_type": "mine", "auto_map": auto_map, "architectures": ["MineForCausalLM"]}
    folder = changed(build("llama")[1], tmp_path, config=config)
    (folder / "code.py").write_text(REMOTE)
    assert "transformers cannot read its config.json" in refusal(folder)
    trusted = collected(folder, trust_remote_code=True)
    expected = collected(build("llama")[1])
    assert torch.equal(trusted["lm_head.weight"].second_moment, expected["lm_head.weight"].second_moment)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().samples = 3
