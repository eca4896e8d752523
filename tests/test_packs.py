"""Outputs that hold several experts: what a pack keeps, what is written of it, and that each expert comes back."""

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from checkpoints import llama, load, save
from tiny import bits, merge, tensor
from vocabularies import write

import merger as merger_package
from merger.checkpoint.tensor_info import Info
from merger.engine.merge import merge as run
from merger.errors import CheckpointError, RecipeError
from merger.inspection import inspect_merge
from merger.methods.byom import byom
from merger.methods.emr import emr
from merger.methods.tall_masks import tall_masks
from merger.outputs.extract import extract
from merger.outputs.verify import DeepCheck, verify
from merger.pipeline.in_memory import merge_stages
from merger.pipeline.passes import Sizes, run_slices, run_tensors
from merger.pipeline.registry import Form, checked
from merger.planning.packed import Packed, bits_of, mask_of
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

EXPERTS = ("code", "math", "chat")
PACKS = ("emr", "tall_masks", "byom", "tsv_c", "separate")


def whole(method, deltas, **parameters):
    """What a pack makes of a tensor that is one slice, and all of the model."""
    results, elements = [], deltas[0].numel()

    def carry(_):
        results.append((yield from method(deltas, **parameters)))

    def visit(_, model_totals, earlier_sums):
        return run_slices(
            1, carry, sizes=Sizes(elements, elements), model_totals=model_totals, earlier_sums=earlier_sums
        )

    run_tensors([0], visit)
    return results[-1]


def task_vectors(case):
    return torch.stack([tensor(delta) for delta in case["inputs"]["deltas"].values()])


def rebuilt(method, parameters, deltas, expert, **options):
    """One expert's task vector as a pack gives it back, on a base of zeros."""
    return merge(checked(method, parameters), deltas, expert=expert, **options)


def assert_close(result, expected):
    torch.testing.assert_close(result, tensor(expected), rtol=0, atol=2e-6)


# --- golden values --------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_sign", ["zero", "negative"])
def test_emr(golden, zero_sign):
    case = golden[f"emr_zero_sign_{zero_sign}"]
    result, outputs = whole(emr, task_vectors(case), zero_sign=zero_sign), case["outputs"]
    assert_close(result["unified"], outputs["unified"])
    assert result["mask"].tolist() == list(outputs["masks"].values())
    assert_close(result["rescale"], list(outputs["rescalers"].values()))
    first = rebuilt("emr", {"zero_sign": zero_sign}, case["inputs"]["deltas"], "a", base=case["inputs"]["base"])
    assert_close(first, outputs["task_a"])


def test_tall_masks(golden):
    case = golden["tall_masks"]
    result = tall_masks(task_vectors(case), lambda_t=[Fraction("0.4")] * 3)
    assert_close(result["unified"], case["outputs"]["mtl"])
    assert result["mask"].tolist() == list(case["outputs"]["masks"].values())
    for expert, expected in case["outputs"]["reconstructed"].items():
        assert_close(rebuilt("tall_masks", {}, case["inputs"]["deltas"], expert), expected)


def test_byom(golden):
    case = golden["byom_fft"]
    params = case["params"]
    result = whole(byom, task_vectors(case), density=Fraction(params["keep"]), lambda_=params["lambda"])
    assert_close(1 + result["merged"], case["outputs"]["shared"])
    first = rebuilt("byom", {"density": 0.25}, case["inputs"]["deltas"], "a", base=case["inputs"]["base"])
    assert_close(first, case["outputs"]["task_a"])


def test_tsv_c(golden):
    case = golden["tsv_c"]
    result = rebuilt("factors", {"rank": case["params"]["rank"]}, {"a": case["inputs"]["delta"]}, "a")
    assert_close(result, case["outputs"]["compressed_delta"])


# --- laws -----------------------------------------------------------------------------------------


def drawn(k, *shape, seed=0):
    return torch.randn(k, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["emr", "tall_masks"])
def test_one_expert_alone_comes_back_bit_for_bit(method):
    (delta,) = drawn(1, 5, 7)
    assert torch.equal(bits(rebuilt(method, {}, {"a": delta}, "a")), bits(delta))


def test_emr_keeps_for_each_expert_the_positions_where_its_sign_was_elected():
    deltas = drawn(3, 6, 8)
    result = whole(emr, deltas)
    elected = deltas.sum(0).sign()
    assert torch.equal(result["unified"].sign(), elected)
    assert torch.equal(result["mask"], deltas.sign() == elected)
    assert (result["unified"].abs() >= (deltas.abs() * result["mask"])).all()


def test_emr_gives_each_expert_the_mean_size_of_its_changes():
    deltas = drawn(3, 6, 8)
    result = whole(emr, deltas)
    sizes = (result["unified"] * result["mask"]).abs().sum((1, 2)) * result["rescale"]
    torch.testing.assert_close(sizes, deltas.abs().sum((1, 2)))


def test_emr_scales_by_the_whole_model_unless_told_otherwise():
    base = {"one": torch.zeros(2, 3), "two": torch.zeros(4, 4)}
    experts = {
        name: {key: drawn(1, *values.shape, seed=i)[0] for key, values in base.items()} for i, name in enumerate("ab")
    }
    factors = {}
    for scope in ("global", "tensor"):
        for key, values in merge_stages(checked("emr", {"scope": scope}), base, experts, expert="a").items():
            unified = whole(emr, torch.stack([experts[name][key] for name in "ab"]))["unified"]
            factors[scope, key] = float((values / unified)[values != 0].mean())
    assert factors["global", "one"] == pytest.approx(factors["global", "two"])
    assert factors["tensor", "one"] != pytest.approx(factors["tensor", "two"])


def test_an_expert_that_agrees_nowhere_is_the_base():
    assert torch.equal(rebuilt("emr", {}, {"a": [[3.0, 5.0]], "b": [[-1.0, -2.0]]}, "b"), torch.zeros(1, 2))


def test_tall_masks_rebuild_from_the_base_or_the_sum_and_hold_less_the_larger_lambda():
    deltas = dict(zip("abc", drawn(3, 6, 8), strict=True))
    total = sum(deltas.values())
    masks = []
    for lambda_t in (0, 0.2, 0.6, 3):
        result = rebuilt("tall_masks", {"lambda_t": lambda_t}, deltas, "b")
        assert ((result == 0) | torch.isclose(result, total, rtol=1e-6, atol=1e-6)).all()
        masks.append(result != 0)
    assert all((superset | ~subset).all() for superset, subset in pairwise(masks))
    assert masks[0].all()


def test_consensus_counts_the_masks_of_tall_masks():
    deltas = drawn(3, 6, 8)
    masks = tall_masks(deltas, lambda_t=[Fraction("0.4")] * 3)["mask"]
    agreed = merge(checked("consensus_ta", {"k": 2, "lambda": 1}), dict(zip("abc", deltas, strict=True)))
    assert torch.equal(agreed != 0, masks.sum(0) >= 2)


@pytest.mark.parametrize("density", [0, 0.25, 1])
def test_byom_keeps_exactly_its_share_and_all_of_it_is_the_expert(density):
    deltas = dict(zip("ab", drawn(2, 6, 8), strict=True))
    merged = 0.3 * sum(deltas.values())
    result = rebuilt("byom", {"density": density}, deltas, "a")
    mask = result == deltas["a"]
    assert int(mask.sum()) == int(density * 48)
    torch.testing.assert_close(result[~mask], merged[~mask])


def test_factors_err_by_what_the_dropped_singular_values_are():
    delta = drawn(1, 9, 6)[0]
    values = torch.linalg.svdvals(delta)
    for rank in (1, 3, 6):
        error = (rebuilt("factors", {"rank": rank}, {"a": delta}, "a") - delta).norm()
        torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-4, atol=1e-5)


def test_factors_of_a_matrix_that_has_fewer_directions_are_exact():
    left_vectors, right_vectors = drawn(2, 8, 1)
    result = rebuilt("factors", {"rank_share": 0.5}, {"a": left_vectors @ right_vectors.T}, "a")
    torch.testing.assert_close(result, left_vectors @ right_vectors.T)


def test_tsv_c_divides_the_directions_among_the_experts():
    deltas = {name: torch.diag(tensor([4, 3, 2, 1])) for name in "ab"}
    assert_close(rebuilt("tsv_c", {}, deltas, "a"), torch.diag(tensor([4, 3, 0, 0])))


@pytest.mark.parametrize("method", ["tsv_c", "factors"])
@pytest.mark.parametrize("kind", ["vector", "embedding", "head"])
def test_what_is_no_matrix_stays_each_experts_own(method, kind):
    deltas = dict(zip("ab", drawn(2, 1 if kind == "vector" else 3, 5), strict=True))
    assert torch.equal(bits(rebuilt(method, {}, deltas, "b", kind=kind)), bits(deltas["b"]))


# --- how it is stored -----------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 8), (3, 5), (4, 16)])
def test_masks_are_stored_eight_to_a_byte_and_come_back(rows, columns):
    mask = drawn(1, rows, columns)[0] > 0
    stored = bits_of(mask)
    assert len(stored) == -(-rows * columns // 8)
    assert torch.equal(mask_of(stored, rows, columns), mask)


def test_the_first_element_is_the_lowest_bit():
    assert bits_of(torch.tensor([[True, False, False, True, False, False, False, False, True]])).tolist() == [9, 1]


def test_names_and_sizes_are_known_before_any_number_is():
    forms = {"unified": Form("weights", shared=True), "mask": Form("bits"), "own": Form("chosen", at="mask", count=3)}
    packed = Packed("w", "byom", ("a", "b"), forms, Info("BF16", (2, 3, 5)), 3, 5, 2, transposed=False)
    assert packed.infos == {
        "w": Info("BF16", (2, 3, 5)),
        "w:mask.a": Info("U8", (2, 2)),
        "w:mask.b": Info("U8", (2, 2)),
        "w:own.a": Info("BF16", (2, 3)),
        "w:own.b": Info("BF16", (2, 3)),
    }


# --- from files to files --------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path):
    """A base and three fine-tunes in bfloat16."""

    def make(dtype=torch.bfloat16, change=lambda tensors: tensors):
        base = llama(0, dtype=dtype)
        for i, name in enumerate(("base", *EXPERTS)):
            tuned = {key: (value + 0.1 * i * llama(i)[key]).to(dtype) for key, value in base.items()}
            save(tmp_path / name, change(tuned), {**CONFIG, "torch_dtype": str(dtype).removeprefix("torch.")})
        return tmp_path

    return make


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "tie_word_embeddings": False}


def recipe(folder, method, output="out", **options):
    return Recipe.parse(
        {
            "base": "base",
            "experts": {name: name for name in EXPERTS},
            **({"method": method} if method else {}),
            "output": {"path": output, **options.pop("into", {})},
            **options,
        },
        folder,
    )


def extracted(folder, expert="code", output="out", **options):
    extract(folder / output, expert, folder / f"{output}-{expert}", **options)
    return load(folder / f"{output}-{expert}")


def in_memory(folder, method, expert, **parameters):
    """The same expert, rebuilt from tensors that are not stored in between, as float32."""
    tensors = {name: {key: value.float() for key, value in load(folder / name).items()} for name in ("base", *EXPERTS)}
    base = tensors.pop("base")
    kinds = {key: "embedding" if "embed" in key else "head" if "lm_head" in key else "linear" for key in base}
    kinds |= {key: "vector" for key, value in base.items() if value.dim() == 1}
    return merge_stages(checked(method, parameters), base, tensors, expert=expert, kinds=kinds)


@pytest.mark.parametrize("method", PACKS)
@pytest.mark.parametrize("expert", EXPERTS)
def test_an_expert_comes_back_from_its_file_as_the_method_says(models, method, expert):
    folder = models(torch.float32)
    run(recipe(folder, method))
    expected = in_memory(folder, method, expert)
    expert_tensors = extracted(folder, expert)
    assert expert_tensors.keys() == expected.keys()
    for name, value in expert_tensors.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-6, atol=2e-6, msg=name)


def test_what_each_expert_keeps_for_itself_has_its_bits(models):
    folder = models()
    run(recipe(folder, "separate"))
    for expert in EXPERTS:
        tensors = load(folder / expert)
        assert all(torch.equal(value, tensors[name]) for name, value in extracted(folder, expert).items())


def test_emr_of_16_bits_rebuilds_from_the_bits_of_the_experts(models):
    folder = models()
    run(recipe(folder, "emr"))
    stored = load(folder / "out")
    sources = [load(folder / name) for name in ("base", *EXPERTS)]
    for name, base in sources[0].items():
        assert (stored[name] == torch.stack([source[name] for source in sources])).any(0).all(), base


@pytest.mark.parametrize("method", ["emr", "byom", "tsv_c"])
def test_slices_and_shards_do_not_change_what_is_written(models, method, monkeypatch):
    folder = models()
    run(recipe(folder, method))
    expected = load(folder / "out")
    monkeypatch.setattr("merger.engine.memory.SLICE", 16)
    run(recipe(folder, method, "again", into={"shard_size": 700}))
    assert (folder / "again" / "experts.safetensors.index.json").is_file()
    repeated = load(folder / "again")
    assert repeated.keys() == expected.keys()
    for name, value in expected.items():
        if "rescale" in name:
            torch.testing.assert_close(repeated[name], value)  # a sum of floats ends where its slices do
        else:
            assert torch.equal(repeated[name], value), name
    monkeypatch.setattr("merger.outputs.extract.SLICE", 16)
    expert_tensors, sliced = extracted(folder, output="out"), extracted(folder, output="again")
    assert all(torch.equal(sliced[name], value) for name, value in expert_tensors.items())


def test_rules_copies_and_packed_experts_of_a_mixture_come_back_too(models):
    def mixture(tensors):
        packed = torch.stack([tensors["model.layers.0.mlp.up_proj.weight"][:5]] * 3)
        return {**tensors, "model.layers.0.mlp.experts.up_proj": packed.contiguous()}

    folder = models(torch.float32, mixture)
    run(recipe(folder, "emr", rules=[{"kinds": ["embedding"], "use": "math"}, {"kinds": ["head"], "method": "linear"}]))
    expert_tensors, expected = extracted(folder), in_memory(folder, "emr", "code", scope="tensor")
    assert torch.equal(expert_tensors["model.embed_tokens.weight"], load(folder / "math")["model.embed_tokens.weight"])
    mean = sum(load(folder / name)["lm_head.weight"] for name in EXPERTS) / 3
    torch.testing.assert_close(expert_tensors["lm_head.weight"], mean)
    name = "model.layers.0.mlp.experts.up_proj"
    assert torch.equal(
        expert_tensors[name] == load(folder / "base")[name], expected[name] == load(folder / "base")[name]
    )


def test_a_stored_head_that_is_the_embedding_comes_back_as_it(models):
    def tied(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    folder = models(torch.float32, tied)
    for name in ("base", *EXPERTS):
        (folder / name / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    run(recipe(folder, "emr"))
    assert "lm_head.weight" not in load(folder / "out")
    expert_tensors = extracted(folder)
    assert torch.equal(expert_tensors["lm_head.weight"], expert_tensors["model.embed_tokens.weight"])


def test_thinned_task_vectors_can_be_packed(models):
    folder = models(torch.float32)
    run(recipe(folder, None, pipeline=[{"top": {"density": 0.25}}, "separate"]))
    base, expert_tensors = load(folder / "base"), extracted(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert int((expert_tensors[name] != base[name]).sum()) == base[name].numel() // 4


@pytest.mark.parametrize("last", ["emr", "tall_masks", {"byom": {"density": "1/4"}}, {"factors": {"rank": 2}}])
def test_weights_that_are_stored_the_other_way_round_come_back_that_way(tmp_path, last):
    stages = [{"top": {"density": "1/2", "scope": "row"}}, last]  # a row has to be one of outputs
    for folder, module in (("gpt2", "h.0.mlp.c_fc"), ("llama", "model.layers.0.mlp.up_proj")):
        for i, name in enumerate(("base", *EXPERTS)):
            weight, bias = drawn(1, 4, 9, seed=i)[0], drawn(1, 9, seed=i)[0]
            stored = weight if folder == "gpt2" else weight.T.contiguous()
            save(tmp_path / folder / name, {f"{module}.weight": stored, f"{module}.bias": bias})
        run(recipe(tmp_path / folder, None, pipeline=stages))
    expert_tensors, expected = extracted(tmp_path / "gpt2"), extracted(tmp_path / "llama")
    weight = expected["model.layers.0.mlp.up_proj.weight"].T
    assert not torch.equal(weight, load(tmp_path / "gpt2" / "code")["h.0.mlp.c_fc.weight"])
    torch.testing.assert_close(expert_tensors["h.0.mlp.c_fc.weight"], weight)


def test_the_plan_says_what_is_written(models):
    folder = models()
    merge_plan = plan(recipe(folder, "emr"))
    run(recipe(folder, "emr"))
    assert merge_plan.bytes_written == sum(
        value.numel() * value.element_size() for value in load(folder / "out").values()
    )
    merge_plan.close()


def test_an_output_of_several_experts_is_verified_like_any_other(models):
    folder = models()
    run(recipe(folder, "tsv_c"))
    assert not verify(folder / "out", deep=DeepCheck(sample=200)).differences
    file = folder / "out" / "experts.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert verify(folder / "out").differences


def test_an_extracted_expert_agrees_with_itself(models):
    folder = models()
    run(recipe(folder, "emr"))
    extracted(folder)
    assert not verify(folder / "out-code").differences


def test_inspect_tells_what_the_masks_hold(models):
    folder = models()
    run(recipe(folder, "emr"))
    shares, overlaps = inspect_merge(folder / "out").notes
    stored = load(folder / "out")
    base = load(folder / "base")
    masks = [torch.cat([mask_of(stored[f"{n}:mask.{e}"], 1, v.numel())[0] for n, v in base.items()]) for e in EXPERTS]
    assert shares.endswith(
        "code {:.4f}, math {:.4f}, chat {:.4f}".format(*(float(mask.float().mean()) for mask in masks))
    )
    three = float(torch.stack(masks).all(0).float().mean())
    assert overlaps.endswith(f"by 3 {three:.4f}")


def test_transformers_loads_an_extracted_expert_and_not_the_several(tmp_path):
    transformers = pytest.importorskip("transformers")
    models = Path(merger_package.__file__).parent / "demo" / "models"
    experts = {task: str(models / task) for task in ("upper", "shift", "double")}
    run(
        Recipe.parse(
            {"base": str(models / "base"), "experts": experts, "method": "emr", "output": {"path": "out"}}, tmp_path
        )
    )
    extract(tmp_path / "out", "shift", tmp_path / "shift", base=str(models / "base"))
    load_model = transformers.AutoModelForCausalLM.from_pretrained
    _, loading_info = load_model(tmp_path / "shift", output_loading_info=True)
    assert not loading_info["missing_keys"]
    assert not loading_info["unexpected_keys"]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "shift")
    with pytest.raises(OSError, match="no file named model"):
        load_model(tmp_path / "out")


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def packed(models):
    folder = models()
    run(recipe(folder, "tall_masks"))
    return folder


def test_an_expert_that_is_not_there_is_named(packed):
    with pytest.raises(RecipeError, match="holds no expert 'cod'; did you mean 'code'"):
        extract(packed / "out", "cod", packed / "x")


def test_a_merge_has_nothing_to_extract(packed):
    run(recipe(packed, "linear", "one"))
    with pytest.raises(CheckpointError, match="is one model, not several experts"):
        extract(packed / "one", "code", packed / "x")


def test_another_base_is_refused(packed):
    with pytest.raises(CheckpointError, match=r"is not the file that was merged, .* base=MODEL says where it is"):
        extract(packed / "out", "code", packed / "x", base=str(packed / "math"))
    assert not (packed / "x").exists()


def test_a_base_that_was_moved_can_be_named(packed):
    expected = extracted(packed)
    (packed / "base").rename(packed / "elsewhere")
    with pytest.raises(CheckpointError, match="base: there is no folder"):
        extract(packed / "out", "code", packed / "x")
    extract(packed / "out", "code", packed / "x", base=str(packed / "elsewhere"))
    assert all(torch.equal(value, expected[name]) for name, value in load(packed / "x").items())


def test_a_manifest_that_says_something_else_is_told_of(packed):
    file = packed / "out" / "merger.json"
    record = json.loads(file.read_text())
    for key, value in [
        ("rows", None),
        ("rows", 9),
        ("results", {"mask": {"holds": "bits", "colour": 3}}),
        ("by", "ties"),
    ]:
        name = "model.norm.weight"
        changed = {**record["tensors"][name], "packed": {**record["tensors"][name]["packed"], key: value}}
        file.write_text(json.dumps({**record, "tensors": {**record["tensors"], name: changed}}))
        with pytest.raises(
            CheckpointError, match=r"not as a merge writes it|cannot be understood|is not there as|does not know"
        ):
            extract(packed / "out", "code", packed / "x")
        assert not (packed / "x").exists()


def test_side_files_in_folders_come_along(models):
    folder = models()
    write(folder / "base" / "1_Pooling" / "config.json", "{}")
    run(recipe(folder, "tall_masks"))
    extracted(folder)
    assert (folder / "out-code" / "1_Pooling" / "config.json").read_text() == "{}"


def test_a_side_file_out_of_the_folder_is_not_followed(packed):
    file = packed / "out" / "merger.json"
    record = json.loads(file.read_text())
    outside_files = dict.fromkeys(("../stolen", "a/../../stolen", str(packed / "stolen")), "0" * 64)
    file.write_text(json.dumps({**record, "files": {**record["files"], **outside_files}}))
    (packed / "stolen").write_text("secret")
    extracted(packed)
    assert not list(packed.glob("out-code*/../stolen*/*"))
    assert sorted(path.name for path in (packed / "out-code").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_an_output_that_is_there_is_not_replaced_unasked(packed):
    extracted(packed)
    with pytest.raises(RecipeError, match="is there already"):
        extracted(packed)
    extracted(packed, force=True)


def test_an_input_is_never_overwritten(packed):
    for place in ("out", "base"):
        with pytest.raises(RecipeError, match="is, holds or lies in the input"):
            extract(packed / "out", "code", packed / place, force=True)


def test_several_experts_are_no_input_of_a_merge(packed):
    with pytest.raises(CheckpointError, match="holds several experts, and no model; `merger extract` writes one"):
        plan(Recipe.parse({**recipe(packed, "linear").spelled_out(), "base": "out"}, packed))


def test_nothing_follows_a_pack(packed):
    with pytest.raises(RecipeError, match="a pack makes more than one model, so no stage can follow it"):
        recipe(packed, None, pipeline=["emr", {"scale": {"lambda": 2}}])


def test_a_pack_is_no_inner_method(packed):
    with pytest.raises(RecipeError, match="makes more than one model"):
        recipe(packed, "knots", parameters={"inner": "tsv_c"})


def test_rows_that_one_expert_added_cannot_be_packed(packed):
    tensors = load(packed / "code")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save(packed / "code", tensors, {**CONFIG, "vocab_size": 9})
    with pytest.raises(CheckpointError, match="emr cannot hold rows that only code has; set extra_rows: drop"):
        plan(recipe(packed, "emr"))
    run(recipe(packed, "emr", "dropped", extra_rows="drop"))
    assert extracted(packed, output="dropped")["lm_head.weight"].shape == (8, 4)


def test_the_command_extracts(packed, merger):
    ran = merger("extract", packed / "out", "math", "-o", packed / "math-again", "--json")
    assert (ran.code, json.loads(ran.out)["expert"]) == (0, "math")
    ran = merger("extract", packed / "out", "maths", "-o", packed / "x")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"error: {packed / 'out'}: holds no expert 'maths'; did you mean 'math'?\n"
