"""Merges from end to end: checkpoints in, one checkpoint out, the same bytes whatever the machine."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import CONFIG, llama, load, same_bits, save, trio
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import WORDS, save_tokenizer, write

import merger.engine.machine
from merger.checkpoint import side_files as manifest
from merger.engine.merge import merge
from merger.errors import CheckpointError, RecipeError, ResourceError
from merger.options import RunOptions
from merger.outputs.verify import verify
from merger.pipeline.in_memory import merge_stages
from merger.pipeline.registry import checked
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

UP, EMBEDDING, HEAD = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
METHODS = [
    pytest.param("linear", {"weight": {"code": 0.3, "math": "2/3"}}, id="linear"),
    pytest.param("task_arithmetic", {"lambda": 0.4}, id="task_arithmetic"),
    pytest.param("slerp", {"t": [0.2, 0.8]}, id="slerp"),
    pytest.param("slerp", {"scope": "global"}, id="slerp of the whole model"),
    pytest.param("ties", {"density": 0.3, "scope": "tensor"}, id="ties by tensor"),
    pytest.param("ties", {"density": {"code": 0.3, "math": "1/3"}}, id="ties of the whole model"),
    pytest.param("ties", {"density": 0.3, "zero_sign": "majority"}, id="ties with a sign of the whole model"),
    pytest.param("dare_linear", {"density": 0.5}, id="dare_linear"),
    pytest.param("dare_ties", {"density": 0.5}, id="dare_ties"),
    pytest.param("della", {"density": 0.5}, id="della"),
    pytest.param("breadcrumbs", {"drop_low": 0.5}, id="breadcrumbs"),
    pytest.param("breadcrumbs", {"drop_low": 0.5, "scope": "global"}, id="breadcrumbs of the whole model"),
    pytest.param("im", {"density": 0.4}, id="im"),
    pytest.param("im", {"density": 0.4, "scope": "global", "order": "listed"}, id="im of the whole model"),
    pytest.param("ties_im", {"density": 0.4}, id="ties_im"),
    pytest.param("cabs", {"n": 1, "m": 4}, id="cabs"),
    pytest.param("cabs_low_overlap", {"n": 3, "m": 4}, id="cabs_low_overlap"),
    pytest.param("consensus_ta", {"lambda": 1}, id="consensus_ta"),
    pytest.param("consensus_ties", {"density": 0.5, "lambda": 1}, id="consensus_ties"),
    pytest.param("localize_stitch", {"density": 0.4}, id="localize_stitch"),
    pytest.param("pcb", {"density": 0.4}, id="pcb"),
    pytest.param("pcb", {"density": 0.4, "variant": "official"}, id="pcb as its authors do it"),
    pytest.param("sce", {"select_topk": 0.4}, id="sce"),
    pytest.param("metagpt", {}, id="metagpt"),
    pytest.param("nan", {}, id="nan"),
    pytest.param("model_stock", {"scope": "row"}, id="model_stock by row"),
    pytest.param("karcher", {"scope": "global"}, id="karcher"),
    pytest.param("nuslerp", {"scope": "column"}, id="nuslerp by column"),
    pytest.param("ram", {"r": 0.1, "scope": "global"}, id="ram"),
    pytest.param("tsv_m", {}, id="tsv_m"),
    pytest.param("iso_cts", {"common": 0.5}, id="iso_cts"),
    pytest.param("star", {"head": True}, id="star with the head"),
    pytest.param("knots", {"inner": {"ties": {"density": 0.5}}}, id="knots"),
    pytest.param("opcm", {}, id="opcm of the whole model"),
    pytest.param("wudi", {}, id="wudi"),
    pytest.param("wudi_svc", {}, id="wudi_svc"),
]


@dataclass(frozen=True)
class Models:
    """A base and its experts, in memory and in folders of their names."""

    folder: Path
    tensors: dict

    def merged(self, method="linear", parameters=None, *, path="out", output=None, **options):
        """What a merge writes: the output's tensors."""
        self.run(method, parameters, output={"path": path, **(output or {})}, **options)
        return load(self.folder / path)

    def run(self, method="linear", parameters=None, *, output=None, force=False, options=RunOptions(), **recipe):
        choice = {} if "pipeline" in recipe else {"method": method, "parameters": parameters or {}}
        experts = {name: name for name in self.tensors if name != "base"}
        content = {"base": "base", "experts": experts, "output": output or {"path": "out"}, **choice, **recipe}
        return merge(Recipe.parse(content, self.folder), options, force=force)

    def record(self, path="out"):
        return json.loads((self.folder / path / "merger.json").read_text())


def models(folder, tensors, configs=None):
    for name, model in tensors.items():
        save(folder / name, model, (configs or {}).get(name, CONFIG))
    return Models(folder, tensors)


@pytest.fixture
def drawn(tmp_path):
    """A Llama and two experts with random weights, in float32."""
    return Models(tmp_path, trio(tmp_path))


@pytest.fixture
def alike(tmp_path):
    """A bfloat16 Llama and three experts whose deltas have few values, so that equal scores abound."""
    base = {name: tensor.mul(4).round().bfloat16() for name, tensor in llama(0, layers=1).items()}
    generator = torch.Generator().manual_seed(1)
    tensors = {"base": base}
    for name in ("code", "math", "wiki"):
        tensors[name] = {
            key: values + torch.randint(-2, 3, values.shape, generator=generator).bfloat16() / 4
            for key, values in base.items()
        }
    return models(tmp_path, tensors)


def in_memory(models, method, parameters):
    """The same merge by the public function on tensors."""
    recipe = {"base": "base", "experts": {n: n for n in models.tensors if n != "base"}, "output": {"path": "x"}}
    merge_plan = plan(Recipe.parse({**recipe, "method": method, "parameters": parameters}, models.folder))
    merge_plan.close()
    base, *experts = ({n: t.float() for n, t in model.items()} for model in models.tensors.values())
    return merge_stages(
        checked(method, parameters),
        base,
        dict(zip(recipe["experts"], experts, strict=True)),
        places={tensor.name: tensor.place for tensor in merge_plan.tensors},
        kinds={tensor.name: tensor.kind for tensor in merge_plan.tensors},
    )


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_files_are_merged_as_tensors_in_memory_are(drawn, method, parameters):
    assert same_bits(drawn.merged(method, parameters), in_memory(drawn, method, parameters))


@pytest.mark.parametrize(
    ("method", "parameters"), [row for row in METHODS if "slerp" not in row.id and "{'code'" not in str(row.values)]
)
def test_equal_scores_in_bfloat16_are_settled_as_in_memory(alike, method, parameters):
    parameters = {"density": 0.3} if method in ("im", "ties_im") else parameters
    expected = {name: tensor.bfloat16() for name, tensor in in_memory(alike, method, parameters).items()}
    assert same_bits(alike.merged(method, parameters), expected)


def test_a_ranking_of_the_whole_model_is_one_sort_of_all_its_tensors(alike, monkeypatch):
    monkeypatch.setattr(merger.engine.memory, "SLICE", 12)
    base, code = alike.tensors["base"], alike.tensors["code"]

    merged = alike.merged(pipeline=[{"top": {"density": 0.3, "scope": "global"}}, "sum"], experts={"code": "code"})

    names = sorted(base)  # numbers of one digit, so this is the natural order
    scores = torch.cat([(code[name].float() - base[name].float()).abs().flatten() for name in names])
    selection = torch.zeros_like(scores, dtype=torch.bool)
    selection[scores.argsort(descending=True, stable=True)[: int(len(scores) * 3 // 10)]] = True
    for name, mask in zip(names, selection.split([base[name].numel() for name in names]), strict=True):
        assert same_bits(merged[name], code[name].where(mask.view_as(code[name]), base[name]))


@pytest.mark.parametrize(
    "pipeline",
    [
        [{"top": {"density": 0.5, "scope": "row"}}, "sum"],
        [{"model_stock": {"scope": "row"}}],
        [{"nuslerp": {"scope": "row"}}],
        [{"nuslerp": {"scope": "column"}}],
    ],
    ids=lambda pipeline: str(pipeline[0]),
)
def test_a_conv1d_is_merged_by_its_output_neurons(tmp_path, pipeline):
    def gpt(seed):
        generator = torch.Generator().manual_seed(seed)
        return {"h.0.c_fc.weight": torch.randn(4, 6, generator=generator), "h.0.c_fc.bias": torch.zeros(6)}

    tensors = {"base": gpt(0), "code": gpt(1), "math": gpt(2)}

    merged = models(tmp_path, tensors).merged(pipeline=pipeline)["h.0.c_fc.weight"]

    turned = {name: {"w": model["h.0.c_fc.weight"].T.contiguous()} for name, model in tensors.items()}
    base = turned.pop("base")
    stages = [(stage, {}) if isinstance(stage, str) else next(iter(stage.items())) for stage in pipeline]
    assert same_bits(merged, merge_stages([checked(*stage) for stage in stages], base, turned)["w"].T)


@pytest.mark.parametrize("method", ["knots", "wudi"])
def test_a_conv1d_is_turned_for_methods_of_whole_matrices(tmp_path, method):
    def gpt(seed):
        drawn = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        return {"h.0.c_fc.weight": drawn, "h.0.c_fc.bias": torch.zeros(6)}

    tensors = {"base": gpt(0), "code": gpt(1), "math": gpt(2)}

    merged = models(tmp_path, tensors).merged(method)["h.0.c_fc.weight"]

    turned = {name: {"w": model["h.0.c_fc.weight"].T.contiguous()} for name, model in tensors.items()}
    base = turned.pop("base")
    torch.testing.assert_close(merged, merge_stages(checked(method, {}), base, turned)["w"].T)


def test_packed_experts_are_each_decomposed_as_a_matrix(tmp_path):
    name = "layers.0.mlp.experts.down_proj"
    draws = torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    tensors = {label: {name: drawn} for label, drawn in zip(("base", "code", "math"), draws, strict=True)}

    configs = {label: {**CONFIG, "hidden_size": 4} for label in tensors}

    merged = models(tmp_path, tensors, configs).merged("tsv_m")[name]

    for e in range(3):
        base, code, math = ({"w": model[name][e]} for model in tensors.values())
        assert same_bits(merged[e], merge_stages(checked("tsv_m", {}), base, {"code": code, "math": math})["w"])


def test_packed_experts_are_each_merged_as_a_matrix(tmp_path):
    generator = torch.Generator().manual_seed(0)
    name = "layers.0.mlp.experts.down_proj"
    tensors = {label: {name: torch.randn(3, 4, 5, generator=generator)} for label in ("base", "code", "math")}
    parameters = {"density": 0.3, "scope": "tensor"}

    merged = models(tmp_path, tensors).merged("ties", parameters)[name]

    for e in range(3):
        base, code, math = ({"w": model[name][e]} for model in tensors.values())
        assert same_bits(merged[e], merge_stages(checked("ties", parameters), base, {"code": code, "math": math})["w"])


def test_rules_are_carried_out(drawn):
    merged = drawn.merged(
        "task_arithmetic",
        rules=[
            {"tensors": "embed", "use": "math"},
            {"tensors": "lm_head", "use": "base"},
            {"kinds": ["vector"], "method": "linear"},
        ],
    )

    base, code, math = drawn.tensors.values()
    assert same_bits(merged[EMBEDDING], math[EMBEDDING])
    assert same_bits(merged[HEAD], base[HEAD])
    norm = "model.norm.weight"
    torch.testing.assert_close(merged[norm], (code[norm] + math[norm]) / 2)
    torch.testing.assert_close(merged[UP], code[UP] + math[UP] - base[UP])


def test_a_rule_takes_what_only_one_expert_has(tmp_path):
    checkpoints = models(tmp_path, {"base": llama(0), "code": llama(1), "math": {**llama(2), "extra": torch.arange(3)}})
    merged = checkpoints.merged(rules=[{"tensors": "^extra$", "use": "math"}])
    assert same_bits(merged["extra"], torch.arange(3))
    assert checkpoints.record()["tensors"]["extra"] == {"kind": "buffer", "stored as": "I64 [3]", "copied from": "math"}


def test_tensors_that_share_a_ranking_are_those_of_one_rule(drawn):
    parameters = {"density": 0.1}
    merged = drawn.merged("ties", parameters, rules=[{"tensors": "layers", "method": "ties", "parameters": parameters}])

    for part in (lambda name: "layers" in name, lambda name: "layers" not in name):
        base, code, math = ({n: t for n, t in model.items() if part(n)} for model in drawn.tensors.values())
        expected = merge_stages(checked("ties", parameters), base, {"code": code, "math": math})
        assert same_bits({name: merged[name] for name in expected}, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_another_dtype_is_one_rounding_away(alike, dtype):
    merged = alike.merged("linear", output={"dtype": dtype})
    exact = in_memory(alike, "linear", {})
    assert same_bits(merged, {name: tensor.to(getattr(torch, dtype)) for name, tensor in exact.items()})
    assert json.loads((alike.folder / "out" / "config.json").read_text())["dtype"] == dtype


def test_models_of_different_dtypes_meet_in_float32_and_come_out_as_the_base(tmp_path):
    tensors = {"base": llama(0, dtype=torch.float16), "code": llama(1), "math": llama(2, dtype=torch.bfloat16)}
    merged = models(tmp_path, tensors).merged("linear")
    expected = in_memory(Models(tmp_path, tensors), "linear", {})
    assert same_bits(merged, {name: tensor.half() for name, tensor in expected.items()})


def test_a_missing_tensor_counts_as_unchanged_on_request(tmp_path):
    base, code, math = llama(0), llama(1), llama(2)
    reduced_code = {name: tensor for name, tensor in code.items() if name != UP}

    merged = models(tmp_path, {"base": base, "code": reduced_code, "math": math}).merged("linear", missing="zero")

    full = {"base": base, "code": {**code, UP: base[UP]}, "math": math}
    assert same_bits(merged, in_memory(models(tmp_path / "full", full), "linear", {}))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (1, 1)])
def test_tensors_of_next_to_nothing_are_merged_too(tmp_path, shape):
    tensors = {name: {"x": torch.full(shape, value)} for name, value in (("base", 1.0), ("code", 2.0), ("math", 4.0))}
    merged = models(tmp_path, tensors).merged("ties", {"density": 1})
    assert same_bits(merged, {"x": torch.full(shape, 3.0)})


# --- copies are copies ----------------------------------------------------------------------------


def bit_patterns(dtype, seed, count=4096):
    """Finite numbers of any sign and size, -0 and subnormals among them."""
    integers = {2: torch.int16, 4: torch.int32}[torch.empty(0, dtype=dtype).element_size()]
    info = torch.iinfo(integers)
    drawn = torch.randint(info.min, info.max, (count,), generator=torch.Generator().manual_seed(seed), dtype=integers)
    values = drawn.view(dtype)
    values[:4] = torch.tensor([0.0, -0.0, 1e-30, -1e-30], dtype=dtype)
    return values.where(values.isfinite() & (values.abs() < 1e37), torch.tensor(-0.0, dtype=dtype)).view(64, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_one_expert_taken_whole_is_that_expert_and_none_of_it_is_the_base(tmp_path, dtype, seed):
    tensors = {"base": {"w.weight": bit_patterns(dtype, seed)}, "code": {"w.weight": bit_patterns(dtype, seed + 100)}}
    checkpoints = models(tmp_path, tensors)
    assert same_bits(checkpoints.merged("task_arithmetic", path="whole"), tensors["code"])
    assert same_bits(checkpoints.merged("task_arithmetic", {"lambda": 0}, path="none"), tensors["base"])


def test_float64_is_copied_whole_though_merged_in_float32(tmp_path):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 8, 8, dtype=torch.float64, generator=generator)
    tensors = {"base": {"w.weight": drawn[0]}, "code": {"w.weight": drawn[1]}}
    checkpoints = models(tmp_path, tensors)
    assert same_bits(checkpoints.merged("task_arithmetic", path="whole"), tensors["code"])
    assert same_bits(checkpoints.merged("task_arithmetic", {"lambda": 0}, path="none"), tensors["base"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_position_that_one_expert_claims_has_its_bits_and_one_that_none_claims_the_bases(tmp_path, dtype):
    tensors = {
        name: {"w.weight": bit_patterns(dtype, seed)} for seed, name in enumerate(("base", "code", "math", "wiki"))
    }
    merged = models(tmp_path, tensors).merged("im", {"density": 0.3})["w.weight"]

    def as_integers(values):
        return values.view(torch.int16 if values.element_size() == 2 else torch.int32)

    masks = [as_integers(merged) == as_integers(model["w.weight"]) for model in tensors.values()]
    assert torch.stack(masks).any(0).all()
    assert all(int(mask.sum()) >= int(0.1 * merged.numel()) - 4 for mask in masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_tensor_used_as_it_is_keeps_every_bit(tmp_path, dtype):
    values = bit_patterns(torch.bfloat16, 3).to(dtype)
    values[0, 5] = float("nan")
    tensors = {"base": {"w.weight": torch.ones_like(values)}, "code": {"w.weight": values}}
    merged = models(tmp_path, tensors).merged(rules=[{"tensors": "w", "use": "code"}])
    assert same_bits(merged, tensors["code"])


# --- heads, rows, buffers -------------------------------------------------------------------------

TIED = {**CONFIG, "tie_word_embeddings": True}


@pytest.mark.parametrize("method", ["dare_ties", "ties"])
def test_a_stored_tied_head_stays_the_embedding_bit_for_bit(tmp_path, method):
    def doubled(seed):
        tensors = llama(seed)
        return {**tensors, HEAD: tensors[EMBEDDING].clone()}

    tensors = {"base": doubled(0), "code": doubled(1), "math": doubled(2)}
    merged = models(tmp_path, tensors, dict.fromkeys(tensors, TIED)).merged(method, {"density": 0.5})
    assert same_bits(merged[HEAD], merged[EMBEDDING])

    headless = {name: {n: t for n, t in model.items() if n != HEAD} for name, model in tensors.items()}
    single = models(tmp_path / "alone", headless, dict.fromkeys(tensors, TIED)).merged(method, {"density": 0.5})
    assert same_bits({name: merged[name] for name in single}, single)  # it was ranked and drawn for once


def test_a_head_that_one_expert_untied_is_merged_with_the_others_embeddings(tmp_path):
    base, code, math = llama(0), llama(1), llama(2)
    del base[HEAD], math[HEAD]
    checkpoints = models(tmp_path, {"base": base, "code": code, "math": math}, {"base": TIED, "math": TIED})

    merged = checkpoints.merged("task_arithmetic")

    torch.testing.assert_close(merged[HEAD], code[HEAD] + math[EMBEDDING] - base[EMBEDDING])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_rows_of_one_expert_are_copied_and_rows_of_several_averaged(tmp_path):
    tensors = {
        "base": llama(0, dtype=torch.bfloat16),
        "code": llama(1, rows=9, dtype=torch.bfloat16),
        "math": llama(2, rows=11, dtype=torch.bfloat16),
    }
    for name, rows in (("base", 8), ("code", 9), ("math", 11)):
        tensors[name]["lm_head.bias"] = torch.arange(rows).bfloat16()

    merged = models(tmp_path, tensors).merged("linear")

    base, code, math = tensors.values()
    for name in (EMBEDDING, HEAD, "lm_head.bias"):
        assert len(merged[name]) == 11
        assert same_bits(merged[name][9:], math[name][9:])
        mean = (code[name][8].double() + math[name][8].double()) / 2
        assert same_bits(merged[name][8], mean.bfloat16())
        anchored = base[name].float() + (code[name][:8].float() + math[name][:8].float() - 2 * base[name].float()) / 2
        torch.testing.assert_close(merged[name][:8], anchored.bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 11


def test_rows_are_dropped_on_request(tmp_path):
    tensors = {"base": llama(0), "code": llama(1, rows=9)}
    merged = models(tmp_path, tensors).merged("task_arithmetic", extra_rows="drop")
    assert same_bits(merged[HEAD], tensors["code"][HEAD][:8])


def test_integers_are_the_bases_and_a_difference_is_noted(tmp_path):
    def with_ids(ids):
        return {"w.weight": torch.ones(2, 2), "position_ids": torch.tensor(ids), "mask": torch.tensor([True, False])}

    checkpoints = models(tmp_path, {"base": with_ids([0, 1]), "code": with_ids([0, 2]), "math": with_ids([0, 1, 2])})
    messages = []

    result = checkpoints.run(output={"path": "out", "dtype": "float16"}, options=RunOptions(notice=messages.append))

    merged = load(tmp_path / "out")
    assert same_bits(merged["position_ids"], torch.tensor([0, 1]))
    assert merged["mask"].dtype == torch.bool
    note = "position_ids: copied from base, but differs in code, math"
    assert note in messages
    assert note in result.notes
    assert note in checkpoints.record()["notes"]


# --- the same bytes -------------------------------------------------------------------------------

TELLING = [
    pytest.param("ties", {"density": 0.3}, id="a ranking of the whole model"),
    pytest.param("dare_ties", {"density": 0.5}, id="draws"),
    pytest.param("della", {"density": 0.5}, id="draws by rank in a row"),
    pytest.param("ties_im", {"density": 0.3}, id="claims in turn"),
    pytest.param("cabs", {"n": 1, "m": 4}, id="blocks"),
    pytest.param("pcb", {"density": 0.3}, id="sums over the whole model"),
    pytest.param("pcb", {"density": 0.3, "variant": "official"}, id="places in the order of the whole model"),
]


@pytest.mark.parametrize(("method", "parameters"), TELLING)
def test_the_size_of_shards_decides_no_byte_of_a_tensor(alike, method, parameters):
    merged = alike.merged(method, parameters)
    sharded = alike.merged(method, parameters, path="many", output={"shard_size": 1})
    assert len(list((alike.folder / "many").glob("*.safetensors"))) > 10
    assert same_bits(merged, sharded)


@pytest.mark.parametrize(("method", "parameters"), TELLING)
@pytest.mark.parametrize("elements", [1, 12])
def test_the_size_of_slices_decides_no_byte(alike, monkeypatch, method, parameters, elements):
    expected = alike.merged(method, parameters)
    monkeypatch.setattr(merger.engine.memory, "SLICE", elements)
    assert same_bits(expected, alike.merged(method, parameters, path="sliced"))


@pytest.mark.parametrize(("method", "parameters"), TELLING)
def test_what_is_read_again_is_what_would_have_been_held(alike, monkeypatch, method, parameters):
    monkeypatch.setattr(merger.engine.memory, "SLICE", 12)
    expected = alike.merged(method, parameters)
    monkeypatch.setattr(merger.engine.memory, "HOLD", 0)
    assert same_bits(expected, alike.merged(method, parameters, path="again"))


@pytest.mark.parametrize(("method", "parameters"), TELLING)
def test_the_number_of_workers_decides_no_byte(alike, monkeypatch, method, parameters):
    monkeypatch.setattr(merger.engine.memory, "SLICE", 12)
    outputs = []
    for cores in (1, 7):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        outputs.append(alike.merged(method, parameters, path=f"by-{cores}"))
    assert same_bits(*outputs)


def test_a_method_of_whole_matrices_needs_room_for_its_factors(drawn):
    def needed(method):
        content = {"base": "base", "experts": {n: n for n in drawn.tensors if n != "base"}, "output": {"path": "x"}}
        merge_plan = plan(Recipe.parse({**content, "method": method}, drawn.folder))
        merge_plan.close()
        return merger.engine.memory.MemoryNeed.of(merge_plan).bytes(1)

    copies, grams = 4 * 8 * (2 + 8), 3 * 8 * 8  # of the largest matrix, 4 x 8, for two experts
    assert needed("wudi") - needed("linear") == 8 * (copies + grams)


def test_a_cap_on_memory_decides_no_byte(alike):
    free = alike.merged("ties", {"density": 0.3})
    capped = alike.merged(
        "ties",
        {"density": 0.3},
        path="capped",
        options=RunOptions(max_memory=merger.engine.memory.INTERPRETER + 100_000),
    )
    assert same_bits(free, capped)


def test_the_hash_seed_of_python_decides_no_byte_of_the_folder(alike):
    text = "base: base\nexperts: {code: code, math: math, wiki: wiki}\nmethod: dare_ties\noutput: {path: out}\n"
    (alike.folder / "recipe.yaml").write_text(text)
    outputs = []
    for seed in "12":
        command = [sys.executable, "-m", "merger", "run", "recipe.yaml", "--force"]
        subprocess.run(command, cwd=alike.folder, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
        outputs.append({path.name: path.read_bytes() for path in (alike.folder / "out").iterdir()})
    assert outputs[0] == outputs[1]


def test_the_seed_decides_the_draws(alike):
    merged, repeated, reseeded = (
        alike.merged("dare_ties", path=f"out{i}", seed=seed) for i, seed in enumerate((0, 0, 1))
    )
    assert same_bits(merged, repeated)
    assert not same_bits(merged, reseeded)


def test_one_tensors_draws_depend_on_no_other_tensor(alike):
    merged = alike.merged("dare_linear")
    subset = {name: {UP: model[UP]} for name, model in alike.tensors.items()}
    assert same_bits(models(alike.folder / "few", subset).merged("dare_linear")[UP], merged[UP])


# --- what stands beside the weights ---------------------------------------------------------------


def test_a_method_is_called_nine_frames_below_merge(drawn, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("merger.methods.sum.weighted_sum", fail)
    with pytest.raises(ZeroDivisionError) as raised:
        drawn.run("task_arithmetic")
    modules = [entry.frame.f_globals["__name__"] for entry in raised.traceback]
    frames = [module for module in modules if module.startswith("merger.")]
    assert (frames[0], frames[-1]) == ("merger.engine.merge", "merger.methods.sum")
    assert len(frames) <= 9


def test_the_manifest_says_from_what_and_how_it_was_made(drawn):
    (drawn.folder / "recipe.yaml").write_text(
        f"base: {drawn.folder}/base\nexperts: {{code: code, math: {{model: math, weight: 1/3}}}}\n"
        "method: ties\noutput: {path: out}\n"
    )
    merge(Recipe.load(drawn.folder / "recipe.yaml", ["seed=7", "parameters.density=0.5"]))

    record = drawn.record()

    def sha256(path):
        return hashlib.sha256((drawn.folder / path).read_bytes()).hexdigest()

    assert record["shards"] == {"model.safetensors": sha256("out/model.safetensors")}
    assert record["files"] == {"config.json": sha256("out/config.json")}
    assert record["inputs"] == {
        name: {
            "source": name,
            "files": {"model.safetensors": sha256(f"{name}/model.safetensors")},
            "config": hashlib.sha256(json.dumps(CONFIG, sort_keys=True).encode()).hexdigest(),
        }
        for name in ("base", "code", "math")
    }
    assert (record["seed"], record["set"]) == (7, ["seed=7", "parameters.density=0.5"])
    assert {"merger", "python", "torch", "numpy"} <= record["versions"].keys()
    assert record["recipe"]["parameters"]["density"] == 0.5
    assert record["recipe"]["experts"]["math"]["weight"] == "1/3"
    assert record["recipe"]["base"]["model"] == "base"  # no folder of this machine
    assert str(drawn.folder) not in json.dumps(record)


@pytest.mark.parametrize(
    ("method", "stages"), [("ties", []), ("dare_linear", []), ("slerp", ["slerp"]), ("tsv_m", ["tsv_m"])]
)
def test_the_manifest_says_which_stages_depend_on_the_device(drawn, method, stages):
    drawn.run(method)
    assert drawn.record()["device-dependent"] == stages


def test_the_manifests_recipe_makes_the_same_model_again(drawn):
    first = drawn.merged("della", {"density": [0.4, 0.6]}, rules=[{"kinds": ["vector"], "use": "code"}])
    content = {**drawn.record()["recipe"], "output": {"path": "again"}}
    merge(Recipe.parse(content, drawn.folder))
    assert same_bits(first, load(drawn.folder / "again"))


def test_the_card_has_the_recipe_and_takes_no_folder_for_a_repository(drawn):
    drawn.run("ties")
    _, front, body = (drawn.folder / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "merger"]}
    assert yaml.safe_load(body.split("```")[1].removeprefix("yaml\n"))["method"] == "ties"


def test_the_card_links_to_what_came_from_the_hub():
    hub = {"source": "org/base@main", "commit": "a" * 40}
    text = manifest.card("merged", {"base": hub, "code": {"source": "models/code"}, "math": hub}, {}, {}, "model")
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == (["org/base"], "merge")


def test_tokenizer_and_generation_files_come_along(tmp_path):
    checkpoints = models(tmp_path, {"base": llama(0), "code": llama(1, rows=9)})
    for name, words in (("base", WORDS[:8]), ("code", WORDS[:9])):
        save_tokenizer(tmp_path / name, words, chat_template=name)
        for file in ("chat_template.jinja", "generation_config.json", "processor_config.json"):
            write(tmp_path / name / file, {"of": name})
        (tmp_path / name / "optimizer.pt").touch()
        (tmp_path / name / "modeling_custom.py").touch()

    checkpoints.run()

    texts = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert texts["processor_config.json"] == '{"of": "base"}'
    assert {texts[name] for name in ("chat_template.jinja", "generation_config.json")} == {'{"of": "code"}'}
    assert texts["tokenizer.json"] == (tmp_path / "code" / "tokenizer.json").read_text()
    assert set(texts) == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "merger.json",
        "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_files_in_folders_come_along_and_are_verified(tmp_path):
    checkpoints = models(tmp_path, {"base": llama(0), "code": llama(1)})
    names = ["1_Pooling/config.json", "additional_chat_templates/tool_use.jinja", "modules.json", "tokenizer.json"]
    for name in names:
        write(tmp_path / "base" / name, {"model": {"vocab": {"a": 0}}} if name == "tokenizer.json" else "[]")
    checkpoints.run()
    assert checkpoints.record()["files"].keys() == {"config.json", *names}
    assert (tmp_path / "out" / names[0]).read_text() == "[]"
    (tmp_path / "out" / names[1]).write_text("{}")
    (tmp_path / "out" / names[0]).unlink()
    assert [difference.file for difference in verify(tmp_path / "out").differences] == names[:2]


def test_code_and_weights_that_are_not_copied_are_named(tmp_path):
    code = {"AutoModel": "modeling_own.Own", "AutoConfig": ["other/repository--config.C", None]}
    checkpoints = models(tmp_path, {"base": llama(0), "code": llama(1)}, {"base": {**CONFIG, "auto_map": code}})
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    write(tmp_path / "base" / "modules.json", [{"path": ""}, pooling, dense])
    checkpoints.run()
    assert checkpoints.record()["notes"] == [
        "code: config differs from the base: auto_map "
        "{'AutoModel': 'modeling_own.Own', 'AutoConfig': ['other/repository--config.C', None]} -> None",
        "config.json names code, modeling_own.py, which is not copied; copy it if you trust it",
        "modules.json names 2_Dense, whose weights are neither merged nor copied",
    ]


names = st.text(st.characters(categories=("L", "Nd", "Pd")), min_size=1, max_size=5)
described = st.tuples(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]),
    st.lists(st.integers(0, 4), max_size=3),
)


@given(st.dictionaries(names, described, min_size=1, max_size=6), st.data())
def test_every_input_tensor_is_accounted_for(tmp_path_factory, base, data):
    folder = tmp_path_factory.mktemp("models")
    dtype = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
    tensors = {"base": {name: torch.ones(shape).to(kind) for name, (kind, shape) in base.items()}}
    for label in ("code", "math"):
        names_in_model = data.draw(st.sets(st.sampled_from(sorted(base))))
        kinds = {
            name: data.draw(dtype) if base[name][0].is_floating_point else base[name][0] for name in names_in_model
        }
        tensors[label] = {name: torch.full(base[name][1], 3).to(kind) for name, kind in kinds.items()}
        tensors[label] |= {f"extra.{name}": torch.ones(2) for name in data.draw(st.lists(names, max_size=2))}
        tensors[label] |= {} if tensors[label] else {"extra.x": torch.ones(2)}  # a checkpoint is never empty
    checkpoints = models(folder, tensors)

    result = checkpoints.run("linear", missing="zero", rules=[{"tensors": r"^extra\.", "use": "base"}])

    merged, record = load(folder / "out"), checkpoints.record()
    assert merged.keys() == record["tensors"].keys() == tensors["base"].keys()
    for label, model in tensors.items():
        dropped = record["dropped"].get(label, {})
        assert model.keys() == {n for n in record["tensors"] if n in model} | dropped.keys()
    for name, tensor in merged.items():
        assert (tensor.dtype, list(tensor.shape)) == (base[name][0], base[name][1])
        assert ("merged by" in record["tensors"][name]) == tensor.is_floating_point()
    assert result.tensors == {
        "merged": sum(tensor.is_floating_point() for tensor in merged.values()),
        "copied": sum(not tensor.is_floating_point() for tensor in merged.values()),
        "dropped": sum(len(model) for model in record["dropped"].values()),
    }


@given(st.data())
def test_every_tensor_is_accounted_for_whatever_is_tied_biased_or_added(tmp_path_factory, data):
    folder, tensors, configs = tmp_path_factory.mktemp("models"), {}, {}
    q = "model.layers.0.self_attn.q_proj.bias"
    biased = data.draw(st.booleans())
    for seed, label in enumerate(("base", "code", "math")):
        model = llama(seed, layers=1, rows=8 + (data.draw(st.integers(0, 2)) if label != "base" else 0))
        head = data.draw(st.sampled_from(["own", "repeated", "none"]))
        if head != "own":
            del model[HEAD]
        model |= {HEAD: model[EMBEDDING].clone()} if head == "repeated" else {}
        model |= {q: torch.ones(4)} if biased else {}
        model |= {f"extra.{name}": torch.ones(2) for name in data.draw(st.lists(names, max_size=2))}
        tensors[label] = model
        configs[label] = {**CONFIG, "vocab_size": len(model[EMBEDDING]), "tie_word_embeddings": head != "own"}
    checkpoints = models(folder, tensors, configs)

    checkpoints.run("linear", missing="zero", rules=[{"tensors": r"^extra\.", "use": "base"}])

    merged, record = load(folder / "out"), checkpoints.record()
    assert merged.keys() == record["tensors"].keys()
    for label, model in tensors.items():
        dropped = record["dropped"].get(label, {})
        reads = {
            entry["reads"][label]
            for entry in record["tensors"].values()
            if "reads" in entry and label in entry["reads"]
        }
        assert model.keys() <= merged.keys() | dropped.keys() | reads
        assert not dropped.keys() & merged.keys()
    assert tensors["base"].keys() <= merged.keys()


# --- what a run says ------------------------------------------------------------------------------


def test_a_result_says_what_was_done(drawn):
    result = drawn.run("linear", seed=3).as_json()

    stored = sum(tensor.nbytes for tensor in drawn.tensors["base"].values())
    assert result["output"] == str(drawn.folder / "out")
    assert (result["bytes_read"], result["bytes_written"]) == (3 * stored, stored)
    assert result["tensors"] == {"merged": len(drawn.tensors["base"]), "copied": 0, "dropped": 0}
    assert result["peak_memory_bytes"] > 10_000_000
    assert result["seconds"] >= 0
    assert (result["device"], result["seed"], result["notes"]) == (result["device"], 3, [])
    json.dumps(result)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_progress_never_goes_back_and_ends_with_all_done(tmp_path, method):
    checkpoints = models(tmp_path, {"base": llama(0), "code": llama(1, rows=9), "math": llama(2, rows=9)})
    calls = []

    result = checkpoints.run(method, options=RunOptions(progress=lambda *call: calls.append(call)))

    assert {step for step, _, _ in calls} == {"merging"}
    counts = [count for _, count, _ in calls]
    assert counts == sorted(counts)
    assert all(count <= total for _, count, total in calls)
    assert calls[-1][1] == calls[-1][2] == result.bytes_read


# --- whole or absent ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_stopped_leaves_nothing(drawn, error):
    def stop(step, count, total):
        if count > total / 2:
            raise error

    paths = sorted(drawn.folder.rglob("*"))
    with pytest.raises(error):
        drawn.run(options=RunOptions(progress=stop), output={"path": "new/folders/out"})
    assert sorted(drawn.folder.rglob("*")) == paths


def test_a_fault_found_late_leaves_the_old_output_untouched(drawn):
    (drawn.folder / "out").mkdir()
    (drawn.folder / "out" / "model.safetensors").write_text("old")
    drawn.tensors["math"][UP][0, 0] = float("nan")
    save(drawn.folder / "math", drawn.tensors["math"])

    with pytest.raises(CheckpointError, match=r"math: .* holds NaN"):
        drawn.run(force=True)

    assert (drawn.folder / "out" / "model.safetensors").read_text() == "old"
    assert not (drawn.folder / "out.partial").exists()


def test_an_occupied_output_is_replaced_only_by_force(drawn):
    drawn.run("linear")
    with pytest.raises(RecipeError, match="is there already"):
        drawn.run("ties")
    assert drawn.record()["recipe"]["method"] == "linear"

    drawn.run("ties", force=True)

    assert drawn.record()["recipe"]["method"] == "ties"
    assert sorted(os.listdir(drawn.folder)) == ["base", "code", "math", "out"]


def test_a_file_that_appears_at_the_output_meanwhile_stays(drawn):
    def appear(step, count, total):
        (drawn.folder / "out").mkdir(exist_ok=True)
        (drawn.folder / "out" / "precious").touch()

    with pytest.raises(RecipeError, match="is there already"):
        drawn.run(options=RunOptions(progress=appear))

    assert os.listdir(drawn.folder / "out") == ["precious"]
    assert not (drawn.folder / "out.partial").exists()


def test_two_runs_never_write_the_same_folder(drawn):
    (drawn.folder / "out.partial").mkdir()
    with (drawn.folder / "out.partial" / "journal").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RecipeError, match="another run is writing it"):
            drawn.run()
    drawn.run()


def test_an_input_is_never_overwritten_even_by_force(drawn):
    (drawn.folder / "link").symlink_to("math")
    for path in ("code", "link", "code/out", "."):
        with pytest.raises(RecipeError, match="input"):
            drawn.run(force=True, output={"path": path})
    assert same_bits(load(drawn.folder / "math"), drawn.tensors["math"])


def test_a_disk_too_small_is_told_before_the_work(drawn, monkeypatch):
    monkeypatch.setattr(merger.engine.preflight, "_free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match="needs 1,616 bytes, but its disk has 1,000 free"):
        drawn.run()
    assert not (drawn.folder / "out.partial").exists()


def test_an_input_that_shrinks_meanwhile_is_told(drawn, monkeypatch):
    file = drawn.folder / "math" / "model.safetensors"

    def shrink(step, count, total):
        os.truncate(file, 3000)

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(CheckpointError, match=r"ended at byte .* while it was being read"):
        drawn.run(options=RunOptions(progress=shrink))


# --- and transformers loads it --------------------------------------------------------------------


IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BODY = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
TEXT = {**BODY, **IDS, "vocab_size": 16}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4}
SPEECH = {
    **IDS, "decoder_start_token_id": 0, "vocab_size": 16, "d_model": 8, "max_source_positions": 8,
    "max_target_positions": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16,
}  # fmt: skip
TINY = {  # a class of transformers, and a config
    "llama": ("LlamaForCausalLM", {**TEXT, "num_key_value_heads": 1}),
    "llama, tied": ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {**IDS, "n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 16, "n_positions": 8}),
    "gpt_neox": ("GPTNeoXForCausalLM", TEXT),
    "phi": ("PhiForCausalLM", TEXT),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**TEXT, **EXPERTS, "num_key_value_heads": 1}),
    "bert": ("BertForMaskedLM", {**TEXT, "max_position_embeddings": 8}),
    "bert, classifier": ("BertForSequenceClassification", {**TEXT, "max_position_embeddings": 8}),
    "vit": ("ViTForImageClassification", {**BODY, "image_size": 8, "patch_size": 4}),
    "whisper": ("WhisperForConditionalGeneration", SPEECH),
}


def tiny(kind, seed):
    """A model of transformers with random weights."""
    import transformers

    torch.manual_seed(seed)
    name, config = TINY[kind]
    model = getattr(transformers, name)
    return model(model.config_class(**config))


@pytest.mark.parametrize("kind", TINY)
def test_transformers_loads_what_was_merged_with_no_key_missing_or_unexpected(tmp_path, kind):
    for seed, name in enumerate(("base", "code", "math")):
        model = tiny(kind, seed)
        model.save_pretrained(tmp_path / name)
    checkpoints = Models(tmp_path, dict.fromkeys(("base", "code", "math")))

    checkpoints.run("della", {"density": 0.5})

    loaded, loading_info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading_info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    merged = load(tmp_path / "out")
    for name, parameter in loaded.state_dict().items():
        if name in merged:
            assert same_bits(parameter, merged[name])
    assert verify(tmp_path / "base").differences == verify(tmp_path / "out").differences == ()


def test_a_model_with_added_tokens_loads_and_generates(tmp_path):
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate(("base", "code", "math")):
        model = tiny("llama", seed)
        if name == "code":
            model.resize_token_embeddings(18, mean_resizing=False)
        model.save_pretrained(tmp_path / name)

    Models(tmp_path, dict.fromkeys(("base", "code", "math"))).run("ties", output={"path": "out", "dtype": "bfloat16"})

    loaded, loading_info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading_info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    assert loaded.get_input_embeddings().weight.shape == (18, 8)
    assert loaded.generate(torch.tensor([[17]]), max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 4)


def test_the_library_is_the_command(drawn):
    import merger as library

    recipe = library.Recipe.parse(
        "base: base\nexperts: {code: code, math: math}\nmethod: linear\noutput: {path: out}\n", drawn.folder
    )
    assert library.plan(recipe).bytes_written == library.merge(recipe).bytes_written
    assert issubclass(library.RecipeError, library.MergerError)


def test_packed_experts_of_which_there_are_none_are_written_as_such(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for seed, label in enumerate(("base", "code", "math")):
        save(tmp_path / label, {**llama(seed), name: torch.empty(0, 4, 4)})
    content = {"base": "base", "experts": {"code": "code", "math": "math"}, "method": "linear"}
    merge(Recipe.parse({**content, "output": {"path": "out"}}, tmp_path))
    assert load(tmp_path / "out")[name].shape == (0, 4, 4)
