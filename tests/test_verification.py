"""Verification: a whole model passes, and every single thing that is wrong with one is named."""

import hashlib
import json

import pytest
import torch
from checkpoints import CONFIG, llama, save, trio
from safetensors.torch import load_file, save_file

from merger.engine.merge import merge
from merger.errors import CheckpointError, RecipeError
from merger.options import RunOptions
from merger.outputs.verify import DeepCheck, verify
from merger.recipe.recipe import Recipe

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def run(folder, method="ties", parameters=None, *, path="out", **options):
    content = {"method": method, "parameters": parameters or {}, "output": {"path": path, "shard_size": 900}, **options}
    experts = {"code": "code", "math": "math"}
    merge(Recipe.parse({"base": "base", "experts": experts, **content}, folder))
    return folder / path


@pytest.fixture
def merged(tmp_path):
    """A merge of two shards, with its inputs beside it."""
    trio(tmp_path)
    for name in ("base", "code", "math"):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 7}}}))
    return run(tmp_path)


@pytest.fixture
def foreign(tmp_path):
    """A whole checkpoint that merger did not make."""
    return save(tmp_path / "plain", llama(0))


def said(folder, **options):
    return [str(difference) for difference in verify(folder, **options).differences]


def change(path, **values):
    """Sets keys of a JSON file."""
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


def edit(path, name, change):
    """Changes one tensor of a safetensors file, or with None removes it."""
    tensors = load_file(path)
    value = change(tensors.pop(name))
    save_file(tensors if value is None else {**tensors, name: value}, path, {"format": "pt"})


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- whole models ---------------------------------------------------------------------------------


def test_what_was_merged_is_what_it_says(merged):
    verification = verify(merged)
    assert verification.differences == ()
    assert (verification.recorded, verification.tensors, verification.bytes) == (True, 21, 1616)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_of_other_makers_need_only_agree_with_itself(tmp_path, shards):
    verification = verify(save(tmp_path / "model", llama(0), shards=shards))
    assert (verification.differences, verification.recorded, verification.tensors) == ((), False, 21)


def test_a_pickled_model_is_looked_at_too(tmp_path):
    folder = save(tmp_path / "model", llama(0))
    (folder / "model.safetensors").unlink()
    tensors = llama(0)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert said(folder) == []
    tensors[NORM][1] = float("inf")
    torch.save(tensors, folder / "pytorch_model.bin")
    assert said(folder) == [f"pytorch_model.bin: {NORM}: holds 1 value of NaN or infinity"]


def test_a_model_is_read_once_and_told_to_its_end(merged):
    calls = []
    verify(merged, RunOptions(progress=lambda *call: calls.append(call)))
    assert {step for step, _, _ in calls} == {"verifying"}
    assert max(count for _, count, _ in calls) == calls[0][2] == 1616


# --- against merger.json --------------------------------------------------------------------------


def test_one_flipped_bit_is_found_in_its_file(merged):
    hash_before = sha256(merged / FIRST)
    content = bytearray((merged / FIRST).read_bytes())
    content[-1] ^= 1
    (merged / FIRST).write_bytes(content)
    assert said(merged) == [f"{FIRST}: its SHA-256 is {sha256(merged / FIRST)}, but {hash_before} in merger.json"]


def test_a_missing_shard_is_named_with_the_tensors_it_held(merged):
    names = sorted(load_file(merged / SECOND))
    (merged / SECOND).unlink()
    messages = said(merged)
    assert f"{SECOND}: is missing, though model.safetensors.index.json names it" in messages
    assert f"{SECOND}: is missing, though merger.json names it" in messages
    assert {f"merger.json: {name}: is in no file" for name in names} == {line for line in messages if "no file" in line}


def test_a_tensor_of_another_shape_or_dtype_is_named(merged):
    edit(merged / SECOND, NORM, lambda norm: norm.half())
    assert f"{SECOND}: {NORM}: is F16 [4], but F32 [4] in merger.json" in said(merged)


def test_a_tensor_that_was_added_or_removed_is_named_by_index_and_manifest(merged):
    edit(merged / SECOND, NORM, lambda norm: None)
    save_file({**load_file(merged / FIRST), "extra": torch.ones(2)}, merged / FIRST, {"format": "pt"})
    messages = said(merged)
    for line in (
        f"{SECOND}: {NORM}: is not there, though model.safetensors.index.json says so",
        f"merger.json: {NORM}: is in no file",
        f"model.safetensors.index.json: extra: is not named, though {FIRST} holds it",
        f"{FIRST}: extra: is not in merger.json",
    ):
        assert line in messages


def test_weights_that_would_be_loaded_in_their_place_are_named(merged):
    save_file({"w": torch.ones(1)}, merged / "model.safetensors")
    assert "model.safetensors: holds weights that merger.json does not name" in said(merged)


def test_config_and_tokenizer_are_those_that_were_written(merged):
    (merged / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 7}))
    (merged / "tokenizer.json").unlink()
    messages = said(merged)
    assert any(line.startswith("config.json: its SHA-256 is ") for line in messages)
    assert "tokenizer.json: is missing, though merger.json names it" in messages
    assert len(messages) == 2


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("{", "cannot be read: "),
        ("[]", "is not of format 1"),
        ('{"format": 9}', "is not of format 1"),
        ('{"format": 1, "recipe": {}}', "lacks versions, seed, device, device-dependent, recipe.base, recipe.experts"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_a_difference(merged, text, subject):
    (merged / "merger.json").write_text(text)
    (line,) = said(merged)
    assert line.startswith(f"merger.json: {subject}")


# --- names with the prefixes of PyTorch's wrappers ------------------------------------------------


def wrapped(folder, prefix):
    """Writes a model as a script does that saves the wrapper instead of the model in it."""
    return save(folder, {f"{prefix}{name}": value for name, value in llama(0).items()})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_model_that_was_saved_in_a_wrapper_agrees_with_its_config(tmp_path, prefix):
    model = wrapped(tmp_path / "model", prefix)
    assert said(model) == []
    change(model / "config.json", vocab_size=9, num_hidden_layers=3)
    assert said(model) == [
        f"config.json: {EMBEDDING}: has 8 rows, but vocab_size is 9",
        f"config.json: {HEAD}: has 8 rows, but vocab_size is 9",
        "config.json: model.layers.2: is missing, but num_hidden_layers is 3",
    ]


def test_values_and_index_of_a_wrapped_model_keep_the_names_in_the_files(tmp_path):
    tensors = {f"_orig_mod.{name}": value for name, value in llama(0).items()}
    tensors[f"_orig_mod.{NORM}"][1] = float("inf")
    model = save(tmp_path / "model", tensors, shards=2)
    (line,) = said(model)
    assert line.endswith(f": _orig_mod.{NORM}: holds 1 value of NaN or infinity")


def test_a_tensor_that_lies_in_and_outside_a_wrapper_is_named(tmp_path):
    model = save(tmp_path / "model", llama(0) | {f"_orig_mod.{NORM}": torch.ones(4)})
    assert said(model) == [f"holds {NORM} twice, as _orig_mod.{NORM} and as {NORM}; remove one of them"]


# --- what any model says of itself ----------------------------------------------------------------


def test_every_broken_file_is_told_not_just_the_first(merged):
    for file in (FIRST, SECOND):
        (merged / file).write_bytes((merged / file).read_bytes()[:-1])
    messages = said(merged)
    assert [line.split(":")[0] for line in messages if "truncated" in line] == [FIRST, SECOND]


def test_a_folder_without_weights_or_config_says_so(tmp_path):
    (tmp_path / "model").mkdir()
    assert said(tmp_path / "model") == [
        "config.json: has no config.json; is it a model's folder?",
        "model.safetensors: is missing, and there is no pytorch_model.bin nor an index",
    ]
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder"):
        verify(tmp_path / "nowhere")


def test_a_tensor_in_two_files_is_named(tmp_path):
    folder = save(tmp_path / "model", llama(0), shards=2)
    shard, next_shard = sorted(folder.glob("*.safetensors"))
    name, value = next(iter(load_file(shard).items()))
    save_file({**load_file(next_shard), name: value}, next_shard)
    assert f"{next_shard.name}: {name}: is in {shard.name} as well" in said(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_values_that_are_not_finite_are_counted_wherever_they_stand(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr("merger.checkpoint.formats.safetensors.CHUNK", 64)
    tensors = llama(0, dtype=dtype)
    tensors[EMBEDDING].view(-1)[[0, 9, 31]] = float(value)
    tensors["ids"] = torch.full((3,), -1)  # all bits of a NaN, but integers
    assert said(save(tmp_path / "model", tensors)) == [
        f"model.safetensors: {EMBEDDING}: holds 3 values of NaN or infinity"
    ]


def test_the_vocabulary_is_as_long_as_its_tensors(foreign):
    change(foreign / "config.json", vocab_size=9)
    assert said(foreign) == [
        f"config.json: {EMBEDDING}: has 8 rows, but vocab_size is 9",
        f"config.json: {HEAD}: has 8 rows, but vocab_size is 9",
    ]


def test_a_head_that_is_said_to_be_the_embedding_is_it(foreign):
    change(foreign / "config.json", tie_word_embeddings=True)
    line = f"model.safetensors: {HEAD}: is not {EMBEDDING}, though config.json says tie_word_embeddings: true"
    assert said(foreign) == [line]
    embedding = llama(0)[EMBEDDING]
    edit(foreign / "model.safetensors", HEAD, lambda head: embedding)
    assert said(foreign) == []


def test_a_head_that_is_said_to_be_there_is(foreign):
    edit(foreign / "model.safetensors", HEAD, lambda head: None)
    assert said(foreign) == ["config.json: says tie_word_embeddings: false, but there is no head"]
    change(foreign / "config.json", tie_word_embeddings=True)
    assert said(foreign) == []


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_that_of_most_numbers(foreign, key):
    change(foreign / "config.json", **{key: "float32"})
    assert said(foreign) == []
    change(foreign / "config.json", **{key: "bfloat16"})
    assert said(foreign) == ["config.json: says dtype bfloat16, but most numbers are F32"]


def test_no_block_is_missing(tmp_path):
    tensors = {name: tensor for name, tensor in llama(0, layers=3).items() if "layers.1." not in name}
    folder = save(tmp_path / "model", tensors, {**CONFIG, "num_hidden_layers": 4})
    assert said(folder) == [
        "config.json: model.layers.1: is missing, but num_hidden_layers is 4",
        "config.json: model.layers.3: is missing, but num_hidden_layers is 4",
    ]


@pytest.mark.parametrize(
    ("file", "content", "subject"),
    [
        ("tokenizer.json", {"model": {"vocab": {"a": 7, "b": 8, "c": 9}}}, "'b' is number 8"),
        ("tokenizer.json", {"model": {"vocab": [["a", 0.0]] * 9}}, "is number 8"),
        ("tokenizer.json", {"added_tokens": [{"id": 11, "content": "<x>"}]}, "'<x>' is number 11"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"8": {"content": "<x>"}}}, "'<x>' is number 8"),
        ("added_tokens.json", {"<x>": 8}, "'<x>' is number 8"),
        ("vocab.json", {"a": 0, "b": 8}, "'b' is number 8"),
        ("generation_config.json", {"eos_token_id": [0, 8], "pad_token_id": -1}, "'eos_token_id' is number 8"),
    ],
)
def test_no_token_is_beyond_the_embeddings_rows(foreign, file, content, subject):
    change(foreign / file, **content)
    (line,) = said(foreign)
    assert line.startswith(f"{file}: ")
    assert f"{subject}, but {EMBEDDING} has 8 rows" in line


def test_a_tokenizer_that_is_no_json_is_told(foreign):
    (foreign / "tokenizer.json").write_text("{")
    assert said(foreign)[0].startswith("tokenizer.json: is not valid JSON")


# --- merged again ---------------------------------------------------------------------------------

ALL = DeepCheck(sample=99)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("linear", {}), ("ties", {"density": 0.3}), ("dare_ties", {"density": 0.5}), ("slerp", {"scope": "global"})],
)
@pytest.mark.parametrize("deep", [ALL, DeepCheck(sample=1, seed=3)])
def test_a_sample_comes_out_the_same_again(tmp_path, method, parameters, deep):
    trio(tmp_path)
    verification = verify(run(tmp_path, method, parameters), deep=deep)
    assert verification.differences == ()
    assert len(verification.recomputed) == min(deep.sample, 21)


def test_a_value_that_the_inputs_do_not_make_is_found_though_merger_json_agrees(merged):
    def bent(norm):
        norm[[1, 2]] += 1
        return norm

    edit(merged / SECOND, NORM, bent)
    record = json.loads((merged / "merger.json").read_text())
    change(merged / "merger.json", shards={**record["shards"], SECOND: sha256(merged / SECOND)})
    assert said(merged) == []
    assert said(merged, deep=ALL) == [f"{SECOND}: {NORM}: 2 of its 4 values are not what its inputs make"]


def test_the_seed_chooses_the_sample(merged):
    samples = [verify(merged, deep=DeepCheck(sample=4, seed=seed)).recomputed for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


def test_inputs_that_have_changed_are_named(merged):
    save(merged.parent / "math", llama(7))
    assert said(merged, deep=ALL) == [
        "merger.json: inputs.math.files.model.safetensors: is not what it was when it was merged"
    ]


def test_a_folder_that_was_moved_is_checked_with_its_recipe(merged, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = "base: base\nexperts: {code: code, math: math}\nmethod: ties\noutput: {path: here, shard_size: 900}\n"
    recipe.write_text(text)
    moved = merged.rename(tmp_path / "moved")
    with pytest.raises(RecipeError, match=r"does not lie where its recipe wrote it \(out\); give the recipe"):
        verify(moved, deep=ALL)
    assert said(moved, deep=DeepCheck(recipe=recipe)) == []
    recipe.write_text(text + "seed: 4\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: is not the recipe of .*moved: they differ in seed"):
        verify(moved, deep=DeepCheck(recipe=recipe))


def test_what_merger_did_not_make_cannot_be_made_again(foreign):
    with pytest.raises(RecipeError, match=r"has no merger\.json that says from what it could be made again"):
        verify(foreign, deep=ALL)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_says_one_line_or_every_difference_with_exit_code_5(merger, merged):
    ran = merger("verify", merged, "--deep", "--sample", 3)
    line = f"{merged}: is what merger.json says: 21 tensors, 1.62 kB; 3 tensors merged again are the same bits\n"
    assert (ran.code, ran.out, ran.err) == (0, line, "")

    (merged / FIRST).unlink()
    ran = merger("verify", merged)
    assert (ran.code, ran.out) == (5, "")
    assert ran.err.startswith(f"error: {merged}: {FIRST}: is missing")
    assert len(ran.err.splitlines()) > 10


def test_json_holds_every_difference(merger, merged):
    (merged / "tokenizer.json").unlink()
    ran = merger("verify", merged, "--json")
    assert ran.code == 5
    assert json.loads(ran.out)["differences"] == [
        {"file": "tokenizer.json", "tensor": None, "what": "is missing, though merger.json names it"}
    ]
