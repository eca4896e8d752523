"""Packed experts of real architectures, stored [in, out] or [out, in], held against whole models that run."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import load
from tiny import Inputs

import merger
import merger.methods
from merger.calibration import Settings
from merger.calibration import samples as texts
from merger.demo import tasks as demo_tasks
from merger.pipeline.in_memory import merge_stages
from merger.pipeline.registry import checked

TOKENIZER = Path(merger.__file__).parent / "demo" / "models" / "base"
EXPERTS = ("upper", "shift")
SIZE = {
    "vocab_size": 58, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip
LENGTH = 17  # tokens of a sample at most; all have as many, for JetMoe's attention mixes padding in
IN_OUT, OUT_IN = -2, -1  # which axis of a stored matrix is the input
MODELS = {
    "gpt-oss, square": ("GptOssForCausalLM", {"intermediate_size": 16}, IN_OUT),
    "gpt-oss": ("GptOssForCausalLM", {"intermediate_size": 24}, IN_OUT),
    "llama 4, square": ("Llama4ForCausalLM", {"intermediate_size": 16, "intermediate_size_mlp": 20}, IN_OUT),
    "llama 4": ("Llama4ForCausalLM", {"intermediate_size": 24, "intermediate_size_mlp": 20}, IN_OUT),
    "granite": ("GraniteMoeForCausalLM", {"intermediate_size": 24}, OUT_IN),
    "granite, square": ("GraniteMoeForCausalLM", {"intermediate_size": 16}, OUT_IN),
    "jetmoe, square": (
        "JetMoeForCausalLM", {"intermediate_size": 24, "kv_channels": 8, "num_key_value_heads": 2}, OUT_IN
    ),
    "mixtral": ("MixtralForCausalLM", {"intermediate_size": 24}, OUT_IN),
    "qwen 3, square": ("Qwen3MoeForCausalLM", {"intermediate_size": 24, "moe_intermediate_size": 16}, OUT_IN),
}  # fmt: skip


def build(name, seed):
    """A tiny model of an architecture, with random weights."""
    class_name, settings, _ = MODELS[name]
    kind = getattr(transformers, class_name)
    torch.manual_seed(seed)
    model = kind(kind.config_class(**{**SIZE, **settings})).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in parameter_name and parameter_name.endswith("weight") else 0.0
        parameter.data = centre + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a base, two experts and their text, made once for an architecture."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("mixture")
        for seed, label in enumerate(("base", *EXPERTS)):
            build(name, seed).save_pretrained(
                folder / label, save_original_format=name not in ("mixtral", "qwen 3, square")
            )
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(TOKENIZER / file, folder / label)
        for task in EXPERTS:
            lines = (json.dumps({"text": p + a}) for p, a in demo_tasks.examples(task, "calibration", 6))
            (folder / f"{task}.jsonl").write_text("\n".join(lines))
        return folder

    return make


# --- the reference: hooks on the whole model -------------------------------------------------------


def rows_by_expert(name, folder, task):
    """What enters each expert's matrices in a forward pass of the whole model: {stored name: [[n i], ...]}."""
    model = build(name, 1 + EXPERTS.index(task))
    rows_by_key = {}

    def keep(key, expert, rows):
        rows_by_key.setdefault(key, {}).setdefault(expert, []).append(rows.detach().double())

    def parallel(key, module, args):  # JetMoE's, which is given the tokens sorted by expert
        for expert, rows in enumerate(args[0].split(args[1])):
            keep(f"{key}.weight", expert, rows)

    def experts(keys, module, args):
        hidden, scattered = args[0], type(module).__name__.startswith("Llama4")
        for expert in range(3):
            routed = hidden.view(3, -1, 16)[expert] if scattered else hidden[(args[1] == expert).any(-1)]
            rows = routed[routed.any(-1)]
            equation = "ti,io->to" if MODELS[name][2] == IN_OUT else "ti,oi->to"
            gated = torch.einsum(equation, rows, module.gate_up_proj[expert])
            if hasattr(module, "gate_up_proj_bias"):
                gated = gated + module.gate_up_proj_bias[expert]
            gate, up = gated.chunk(2, -1)
            keep(keys[0], expert, rows)
            keep(keys[1], expert, up * module.act_fn(gate) if scattered else module._apply_gate(gated))

    for key, module in model.named_modules():
        if type(module).__name__ == "JetMoeParallelExperts":
            module.register_forward_pre_hook(functools.partial(parallel, key))
        elif isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            pair = (f"{key}.gate_up_proj", f"{key}.down_proj")
            if "granite" in name:  # as the files call them
                block = key.removesuffix(".experts")
                pair = (f"{block}.input_linear.weight", f"{block}.output_linear.weight")
            module.register_forward_pre_hook(functools.partial(experts, pair))
    with torch.no_grad():
        for tokens in samples(folder, task):
            model(input_ids=torch.tensor([tokens]))
    return {key: [torch.cat(by_expert[e]) for e in range(3)] for key, by_expert in rows_by_key.items()}


def samples(folder, task):
    tokenizer = texts.load_tokenizer(folder / task, task, trust_remote_code=False)
    return texts.load_samples(f"{task}.jsonl", folder, tokenizer, Settings(samples=6, max_tokens=LENGTH)).tokens


def inputs_of(rows):
    """What the stages may know of one matrix, given the rows that enter it in each model."""
    return Inputs(
        second_moment=torch.stack([expert_rows.square().mean(0) for expert_rows in rows]).float(),
        mean=torch.stack([expert_rows.mean(0) for expert_rows in rows]).float(),
        gram=torch.stack([expert_rows.T @ expert_rows / len(expert_rows) for expert_rows in rows]).float(),
    )


# --- merges ---------------------------------------------------------------------------------------

METHODS = {
    "obim": [("top", {"density": 0.4, "exclusive": "listed", "score": {"obm": {}}}), ("sum", {})],
    "wanda": [("wanda", {"density": 0.5}), ("sum", {})],
    "regmean": [("regmean", {"alpha": 0.7})],
    "regmean_diag": [("regmean_diag", {})],
    "sparsegpt": [("sparsegpt", {"density": 0.5}), ("sum", {})],
    "rows by magnitude": [("magnitude", {"density": 0.5, "scope": "row"}), ("sum", {})],
}


def merged(folder, output, pipeline, **options):
    """The packed experts of a merge, of which everything else is the base's."""
    stages = [{name: parameters} for name, parameters in pipeline]
    content = {
        "base": "base",
        "experts": {task: task for task in EXPERTS},
        "pipeline": stages,
        "calibration": {"data": {task: f"{task}.jsonl" for task in EXPERTS}, "samples": 6, "max_tokens": LENGTH},
        "rules": [{"kinds": ["linear", "head", "tied", "embedding", "vector"], "use": "base"}],
        "output": {"path": str(output)},
        **options,
    }
    merger.merge(merger.Recipe.parse(content, folder=folder))
    return {name: tensor for name, tensor in load(output).items() if tensor.dim() == 3}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_every_expert_is_merged_by_the_inputs_of_its_own_matrices(mixture, tmp_path, name, method):
    folder, axis = mixture(name), MODELS[name][2]
    rows = [rows_by_expert(name, folder, task) for task in EXPERTS]
    models = [load(folder / label) for label in ("base", *EXPERTS)]
    stages = [checked(*stage) for stage in METHODS[method]]

    result = merged(folder, tmp_path / "out", METHODS[method])

    assert result.keys() == rows[0].keys()
    for key, tensor in result.items():
        for expert, matrix in enumerate(tensor):
            base, *peers = (model[key][expert].T if axis == IN_OUT else model[key][expert] for model in models)
            expected = merge_stages(
                stages,
                {key: base},
                {task: {key: peer} for task, peer in zip(EXPERTS, peers, strict=True)},
                kinds={key: "expert3d"},
                inputs={key: inputs_of([task_rows[key][expert] for task_rows in rows])},
            )[key]
            torch.testing.assert_close(matrix.T if axis == IN_OUT else matrix, expected, rtol=1e-4, atol=1e-5)
