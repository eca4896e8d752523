"""One model saved under other names and packings is read as the same tensors: thirty architectures, and `rename`."""

import json
import shutil
from pathlib import Path

import pytest
import thirty
import torch
from checkpoints import llama, load, same_bits, save

import merger
from merger.demo import tasks as demo_tasks
from merger.errors import CheckpointError, RecipeError
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

TOKENIZER = Path(merger.__file__).parent / "demo" / "models" / "base"
NO_TEXT = {
    "t5": "base is t5, with an encoder and a decoder, which calibration does not run; take a method that needs no text",
    "vit": "a: the model cannot be run on text, so take a method without calibration: ",
    "clip": "a: the model cannot be run on text, so take a method without calibration: ",
}
"""The architectures that obim does not run on, and what it says of each."""


@pytest.fixture(scope="module", params=thirty.MODELS)
def saved(request, tmp_path_factory):
    """Base and two experts of an architecture, each as transformers 4 (LABEL.old) and 5 (LABEL.new) name tensors."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, label in enumerate(("base", "a", "b")):
        model = thirty.build(request.param, seed)
        for names in ("old", "new"):
            model.save_pretrained(folder / f"{label}.{names}", save_original_format=names == "old")
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(TOKENIZER / file, folder / f"{label}.{names}")
    write_text(folder)
    return request.param, folder


def write_text(folder):
    """Text for calibration."""
    lines = (json.dumps({"text": prompt + answer}) for prompt, answer in demo_tasks.examples("upper", "calibration", 4))
    (folder / "text.jsonl").write_text("\n".join(lines))


def merged(folder, base, a, b, **options):
    """The output's tensors of a merge of base and experts in these names."""
    content = {
        "base": f"base.{base}",
        "experts": {"a": f"a.{a}", "b": f"b.{b}"},
        "output": {"path": "out"},
        "method": "ties",
        **options,
    }
    merger.merge(Recipe.parse(content, folder), force=True)
    return load(folder / "out")


@pytest.mark.parametrize("base", ["old", "new"])
def test_both_ways_of_saving_a_model_are_the_same_tensors(saved, base):
    _, folder = saved
    expected = merged(folder, base, base, base)
    assert expected.keys() == load(folder / f"base.{base}").keys()
    other = "new" if base == "old" else "old"
    assert same_bits(merged(folder, base, other, base), expected)


def test_obim_runs_on_both_ways_of_saving_or_says_why_not(saved):
    name, folder = saved
    calibrated = {"method": "obim", "calibration": {"data": "text.jsonl", "samples": 4}}
    if name in NO_TEXT:
        with pytest.raises(CheckpointError) as caught:
            merged(folder, "old", "new", "old", **calibrated)
        (line,) = str(caught.value).splitlines()
        assert line.startswith(NO_TEXT[name])
    else:
        expected = merged(folder, "old", "old", "old", **calibrated)
        assert same_bits(merged(folder, "old", "new", "old", **calibrated), expected)


# --- other names, as frameworks write them ----------------------------------------------------------


def inner(tensors):
    """The tensors of the model within a model with a head, as `LlamaModel.save_pretrained` names them."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def trio(folder, spell):
    """A base, an expert `code`, and an expert `math` whose names `spell` changes."""
    models = {label: llama(seed) for seed, label in enumerate(("base", "code", "math"))}
    for label, tensors in models.items():
        save(folder / label, spell(tensors) if label == "math" else tensors)
    return models


def recipe(folder, math="math", **options):
    content = {"base": "base", "experts": {"code": "code", "math": math}, "method": "ties", "output": {"path": "out"}}
    return Recipe.parse({**content, **options}, folder)


def test_a_model_without_the_prefix_of_its_class_is_read_as_the_same(tmp_path):
    trio(tmp_path / "with", dict)
    trio(tmp_path / "without", inner)
    for name in ("with", "without"):
        merger.merge(recipe(tmp_path / name))
    assert same_bits(load(tmp_path / "without" / "out"), load(tmp_path / "with" / "out"))


def opened(folder, label):
    """An expert as the plan of a merge opens it."""
    content = {"base": "base", "experts": {label: label}, "method": "ties", "output": "out"}
    return plan(Recipe.parse(content, folder)).models[label]


def test_rows_of_packed_experts_are_read_from_their_places(tmp_path):
    for label, seed in (("base", 0), ("a", 1)):
        thirty.build("qwen3_moe", seed).save_pretrained(tmp_path / label, save_original_format=label == "base")
    stored = load(tmp_path / "a")["model.layers.1.mlp.experts.gate_up_proj"]  # [3, 2·8, 16]
    with plan(
        Recipe.parse({"base": "base", "experts": {"a": "a"}, "method": "ties", "output": "out"}, tmp_path)
    ).models["a"] as model:
        rows = model.read_rows("model.layers.1.mlp.experts.2.up_proj.weight", 3, 7)
        whole = model.read("model.layers.1.mlp.experts.2.gate_proj.weight")
    assert same_bits(rows, stored[2, 8 + 3 : 8 + 7])
    assert same_bits(whole, stored[2, :8])


def test_rows_of_experts_stored_apart_are_read_as_packed(tmp_path):
    for label, seed in (("base", 0), ("a", 1)):
        thirty.build("qwen3_moe", seed).save_pretrained(tmp_path / label, save_original_format=label == "a")
    stored = load(tmp_path / "a")
    parts = [
        stored[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"]
        for expert in range(3)
        for part in ("gate", "up")
    ]
    with plan(
        Recipe.parse({"base": "base", "experts": {"a": "a"}, "method": "ties", "output": "out"}, tmp_path)
    ).models["a"] as model:
        rows = model.read_rows("model.layers.1.mlp.experts.gate_up_proj", 5, 30)
    assert same_bits(rows, torch.cat(parts)[5:30])


# --- rename -----------------------------------------------------------------------------------------


def wrapped(tensors):
    return {name.replace("model.", "trunk.body.", 1): tensor for name, tensor in tensors.items()}


def test_a_rename_reads_tensors_by_other_names(tmp_path):
    trio(tmp_path / "plain", dict)
    trio(tmp_path / "wrapped", wrapped)
    merger.merge(recipe(tmp_path / "plain"))
    merger.merge(recipe(tmp_path / "wrapped", {"model": "math", "rename": {r"^trunk\.body\.": "model."}}))
    assert same_bits(load(tmp_path / "wrapped" / "out"), load(tmp_path / "plain" / "out"))


def test_an_error_proposes_the_rename_that_fits_and_the_proposal_runs(tmp_path):
    trio(tmp_path, wrapped)
    with pytest.raises(CheckpointError) as caught:
        plan(recipe(tmp_path))
    proposal = "{model: math, rename: {'^trunk\\.body\\.': 'model.'}}"
    assert str(caught.value) == f"math: names its tensors otherwise than the base; write math: {proposal}"
    text = f"base: base\nexperts:\n  code: code\n  math: {proposal}\nmethod: ties\noutput: out\n"
    merger.merge(Recipe.parse(text, tmp_path))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_rename_that_matches_nothing_names_near_modules(tmp_path):
    trio(tmp_path, dict)
    (tmp_path / "recipe.yaml").write_text(
        "base: base\nexperts:\n  math:\n    model: math\n    rename:\n      '^modell\\.layer\\.': x.\n"
        "method: ties\noutput: out\n"
    )
    with pytest.raises(CheckpointError) as caught:
        plan(tmp_path / "recipe.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'recipe.yaml'}:6: experts.math.rename.^modell\\.layer\\.: matches no tensor; "
        "near names: model.layers, model.layers.1, model.layers.0"
    )


def test_a_rename_of_two_tensors_to_one_name_names_both(tmp_path):
    trio(tmp_path, dict)
    with pytest.raises(CheckpointError) as caught:
        plan(recipe(tmp_path, {"model": "math", "rename": {r"\.(k|v)_proj\.": ".kv_proj."}}))
    assert str(caught.value) == (
        "recipe: experts.math.rename: both model.layers.0.self_attn.k_proj.weight and "
        "model.layers.0.self_attn.v_proj.weight become model.layers.0.self_attn.kv_proj.weight; make the regular "
        "expressions narrower"
    )


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        (
            {"(": "x"},
            "(: x: is no regular expression with its template: missing ), unterminated subpattern at position 0",
        ),
        ({"a": "\\2"}, "a: \\2: is no regular expression with its template: invalid group reference 2 at position 1"),
    ],
)
def test_a_rename_that_is_no_regular_expression_is_a_fault_of_the_recipe(tmp_path, entry, fault):
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, {"model": "math", "rename": entry})
    assert str(caught.value) == f"recipe: experts.math.rename: {fault}"


def test_without_a_rename_the_record_of_a_recipe_is_as_before(tmp_path):
    trio(tmp_path, dict)
    spelled = recipe(tmp_path).spelled_out()
    assert "rename" not in spelled["base"]
    assert "rename" not in spelled["experts"]["math"]


# --- a language model on a vision-language backbone -------------------------------------------------


def text_model(seed):
    """A Llama in the size of the language model of the toy `llava`."""
    torch.manual_seed(seed)
    kind = thirty.transformers.LlamaForCausalLM
    return kind(kind.config_class(**thirty.TEXT)).eval()


@pytest.mark.parametrize("names", ["old", "new"])
def test_a_language_model_merges_onto_a_vision_language_model(tmp_path, names):
    thirty.build("llava", 0).save_pretrained(tmp_path / "base", save_original_format=names == "old")
    text_model(1).save_pretrained(tmp_path / "text")
    base, text = load(tmp_path / "base"), load(tmp_path / "text")
    with pytest.raises(CheckpointError) as caught:
        plan(Recipe.parse({"base": "base", "experts": {"text": "text"}, "method": "linear", "output": "out"}, tmp_path))
    rename = {
        "old": "{'^model\\.': 'language_model.model.'}",
        "new": "{'^model\\.': 'model.language_model.'}",
    }[names]
    assert str(caught.value) == (
        f"text: names its tensors otherwise than the base; write text: {{model: text, rename: {rename}}}"
    )
    recipe_text = f"base: base\nexperts:\n  text: {{model: text, rename: {rename}}}\nmethod: mean\noutput: out\n"
    with_rename = Recipe.parse(recipe_text, tmp_path)
    merge_plan = plan(with_rename)
    merge_plan.close()
    merger.merge(with_rename)

    assert [note for note in merge_plan.notes if note.startswith("base: ")] == {
        "old": [
            "base: no expert has multi_modal_projector: its 4 tensors are copied",
            "base: no expert has vision_tower: its 23 tensors are copied",
        ],
        "new": [
            "base: no expert has model.multi_modal_projector: its 4 tensors are copied",
            "base: no expert has model.vision_tower: its 23 tensors are copied",
        ],
    }[names]
    out = load(tmp_path / "out")
    prefix = {"old": "language_model.model.", "new": "model.language_model."}[names]
    for name, tensor in base.items():
        if "language_model" not in name and "lm_head" not in name:
            assert same_bits(out[name], tensor)
    name = "layers.0.mlp.up_proj.weight"
    assert same_bits(out[prefix + name], text[f"model.{name}"])  # the mean of one expert


@pytest.mark.parametrize("names", ["old", "new"])
def test_obim_ranks_a_language_model_alike_alone_and_within_a_vision_language_base(tmp_path, names):
    whole = thirty.build("llava", 0)
    alone = text_model(0)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "base", save_original_format=names == "old")
    alone.save_pretrained(tmp_path / "alone")
    for seed, label in ((1, "a"), (2, "b")):
        text_model(seed).save_pretrained(tmp_path / label)
    for label in ("base", "alone", "a", "b"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / file, tmp_path / label)
    write_text(tmp_path)
    prefix = {"old": "language_model.model.", "new": "model.language_model."}[names]
    rename = {"rename": {r"^model\.": prefix}}

    within, apart = (
        calibrated(tmp_path, base, {label: {"model": label, **extra} for label in ("a", "b")})
        for base, extra in (("base", rename), ("alone", {}))
    )

    for name, tensor in apart.items():
        counterpart = name.replace("model.", prefix, 1) if name.startswith("model.") else name
        if counterpart not in within:
            counterpart = f"language_model.{name}"
        assert same_bits(within[counterpart], tensor), name


def calibrated(folder, base, experts):
    """The tensors of an obim merge."""
    content = {
        "base": base,
        "experts": experts,
        "method": "obim",
        "calibration": {"data": "text.jsonl", "samples": 4},
        "output": {"path": f"out-{base}"},
    }
    merger.merge(Recipe.parse(content, folder))
    return load(folder / f"out-{base}")
