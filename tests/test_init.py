"""`merger init`: its recipe runs as it stands, and what is misspelt is told before anything is written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from checkpoints import llama, save
from markdown import ROOT, blocks, commands
from safetensors.torch import save_file
from tasks import TASKS, demo_folder  # noqa: F401 a fixture

from merger.calibration.datasets import _READERS
from merger.checkpoint.near_paths import near_path
from merger.recipe.json_schema import json_schema
from merger.recipe.recipe import Recipe
from merger.recipe.recommendations import SAMPLES, SAMPLES_REASON, TEXT, WEIGHTS, ZOO
from merger.recipe.sections import TEXT_SUFFIXES, is_dataset

MODELS = ("models/base", "models/code", "models/french")
TEXTS = ("--data", "code=data/code.jsonl", "--data", "french=data/french.jsonl")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base, two experts and their texts; the current folder. The Hub may not be asked."""
    for seed, name in enumerate(("base", "code", "french")):
        save(tmp_path / "models" / name, llama(seed))
    (tmp_path / "data").mkdir()
    for name in ("code", "french"):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    return tmp_path


def written(path="merge.yaml"):
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def faults(ran):
    """The lines of a refusal, which wrote nothing."""
    assert (ran.code, ran.out) == (2, "")
    assert not Path("merge.yaml").exists()
    return [line.removeprefix("error: ") for line in ran.err.splitlines()]


def save_adapter(path):
    """A LoRA adapter of the models above."""
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    column = llama(5)["model.layers.0.self_attn.q_proj.weight"][:, :1]
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora_A.weight": column.T.contiguous(), f"{key}.lora_B.weight": column.contiguous()}
    save_file(tensors, path / "adapter_model.safetensors")


# --- what is written --------------------------------------------------------------------------------


def test_the_whole_recipe_without_text(merger, folder):
    ran = merger("init", *MODELS)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "merge.yaml: wudi_svc of code, french. Next:\n  merger plan merge.yaml\n  merger run merge.yaml\n"
    assert (
        Path("merge.yaml").read_text()
        == f"""\
# A first recipe, by merger init: `merger plan` says what it would do, `merger run` merges.

# The model that the experts were tuned from: a folder beside this file, or org/name@revision on the Hub.
base: models/base
# Its fine-tunes by name, or adapters for it: NAME: {{model: BASE, adapter: FOLDER}}.
experts:
  code: models/code
  french: models/french

# wudi_svc {WEIGHTS.reason}; it kept {WEIGHTS.share:.3f} of three experts' gains on a 135M model ({WEIGHTS.source}).
method: wudi_svc
# With text of each expert, merger init writes {TEXT.method}.

# A new folder; it appears when the merge is whole.
output: {{path: out/merge}}
"""
    )


def test_with_text_the_recipe_has_the_method_for_text_with_its_reason(merger, folder):
    assert merger("init", *MODELS, *TEXTS).code == 0
    assert written() == {
        "base": "models/base",
        "experts": {"code": "models/code", "french": "models/french"},
        "method": TEXT.method,
        "calibration": {"data": {"code": "data/code.jsonl", "french": "data/french.jsonl"}, "samples": SAMPLES},
        "output": {"path": "out/merge"},
    }
    lines = Path("merge.yaml").read_text().splitlines()
    assert lines[lines.index(f"method: {TEXT.method}") - 1] == f"# {TEXT.method} {TEXT.reason}; {TEXT.evidence}."
    assert lines[lines.index(f"  samples: {SAMPLES}") - 1] == f"  # Of each expert: {SAMPLES_REASON}."


@pytest.mark.parametrize("texts", [(), TEXTS], ids=["without", "with"])
def test_the_recipe_is_valid_by_the_schema(merger, folder, texts):
    merger("init", *MODELS, *texts)
    jsonschema.validate(written(), json_schema())


@pytest.mark.parametrize("with_text", [False, True])
def test_the_recipe_runs_as_it_stands(merger, demo_folder, tmp_path, monkeypatch, with_text):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("demo").symlink_to(demo_folder)
    texts = [f"--data={task}=demo/data/{task}.jsonl" for task in TASKS] if with_text else []
    assert merger("init", "demo/models/base", *(f"demo/models/{task}" for task in TASKS), *texts).code == 0
    assert merger("plan", "merge.yaml").code == 0
    assert merger("run", "merge.yaml", "-q").code == 0
    assert merger("verify", "out/merge").code == 0


def test_a_recipe_elsewhere_has_paths_from_there(merger, folder):
    Path("recipes").mkdir()
    options = ("--data", "code=data/code.jsonl", "--data", f"french={folder}/data/french.jsonl")
    assert merger("init", f"{folder}/models/base", *MODELS[1:], *options, "-o", "recipes/new.yaml").code == 0
    recipe = written("recipes/new.yaml")
    assert recipe["base"] == f"{folder}/models/base"
    assert recipe["experts"] == {"code": "../models/code", "french": "../models/french"}
    assert recipe["calibration"]["data"] == {"code": "../data/code.jsonl", "french": f"{folder}/data/french.jsonl"}
    assert len(Recipe.load("recipes/new.yaml").folders()) == 3
    told = merger("plan", "recipes/new.yaml")  # looks at the texts by the paths, and misses a tokenizer alone
    assert (told.code, "has no tokenizer" in told.err, "data" in told.err) == (3, True, False)


def test_a_path_whose_parent_is_a_link_leads_to_the_same_folder(merger, folder):
    Path("deep/down").mkdir(parents=True)
    Path("link").symlink_to("deep/down")
    assert merger("init", "link/../../models/base", *MODELS[1:]).code == 0
    assert Recipe.load("merge.yaml").folders() == [
        Path.cwd() / written()["base"],
        *(Path.cwd() / model for model in MODELS[1:]),
    ]
    assert os.path.samefile(written()["base"], "models/base")


def test_an_earlier_output_is_not_that_of_the_recipe(merger, folder):
    Path("out/merge").mkdir(parents=True)
    assert merger("init", *MODELS).code == 0
    assert written()["output"] == {"path": "out/merge-2"}


def test_an_adapter_is_an_expert_on_the_base(merger, folder):
    save_adapter(folder / "adapters" / "chat")
    assert merger("init", *MODELS[:2], "adapters/chat").code == 0
    assert written()["experts"] == {
        "code": "models/code",
        "chat": {"model": "models/base", "adapter": "adapters/chat"},
    }
    assert merger("run", "merge.yaml", "-q").code == 0


def test_names_are_the_last_part_valid_and_unique(merger, folder):
    for path in ("a/model v1", "b/model v1", "c/base", "d/no"):
        save(folder / path, llama(7))
    assert (
        merger("init", "models/base", "model_v1=models/code", "a/model v1", "b/model v1/", "c/base", "d/no").code == 0
    )
    assert written()["experts"] == {
        "model_v1": "models/code",
        "model_v1-2": "a/model v1",
        "model_v1-3": "b/model v1",
        "base_model": "c/base",
        "no": "d/no",
    }
    assert merger("plan", "merge.yaml").code == 0


def test_the_name_of_this_folder_is_its_own(merger, folder, monkeypatch):
    monkeypatch.chdir(folder / "models" / "code")
    assert merger("init", "../base", ".", "-o", "../merge.yaml").code == 0
    assert written("../merge.yaml")["experts"] == {"code": "code"}


def test_an_id_of_the_hub_is_written_as_it_is_and_a_note_says_so(merger, folder):
    ran = merger("init", "org/base@v1", "org/chat", "french=models/french")
    assert written()["base"] == "org/base@v1"
    assert written()["experts"] == {"chat": "org/chat", "french": "models/french"}
    assert ran.err == "".join(
        f"note: {name}: there is no such folder here, so it is taken for a repository of the Hub\n"
        for name in ("org/base@v1", "org/chat")
    )


def test_a_name_without_an_organisation_is_that_of_the_hub_by_its_revision_or_split(merger, folder):
    assert merger("init", "gpt2@main", "models/code", "--data", "code=imdb:train").code == 0
    assert (written()["base"], written()["calibration"]["data"]) == ("gpt2@main", {"code": "imdb:train"})


def test_an_existing_recipe_is_replaced_by_force_alone(merger, folder):
    Path("merge.yaml").write_text("mine")
    ran = merger("init", *MODELS, "--data", "code=data/cod.jsonl")
    assert (ran.code, Path("merge.yaml").read_text()) == (2, "mine")
    assert ran.err.splitlines()[0] == "error: --output merge.yaml: is there already; --force replaces it"
    assert len(ran.err.splitlines()) == 3  # and the text of one expert is missing, and that of the other misspelt
    assert merger("init", *MODELS, "--force").code == 0
    assert written()["method"] == WEIGHTS.method


def test_what_to_type_next_has_the_file_in_quotes_where_it_needs_them(merger, folder):
    assert merger("init", *MODELS, "-o", "my merge.yaml").out.splitlines()[1] == "  merger plan 'my merge.yaml'"


# --- what is refused --------------------------------------------------------------------------------


def test_all_that_is_misspelt_is_told_at_once_and_nothing_is_written(merger, folder):
    ran = merger(
        "init",
        "models/bse",
        "mdoels/code",
        "fr=models/frensh",
        "--data",
        "cdoe=data/code.jsonl",
        "--data",
        "fr=data/fr.jsonl",
    )
    assert faults(ran) == [
        "--data cdoe=data/code.jsonl: there is no expert 'cdoe'; did you mean 'code'?",
        "there is no folder models/bse; did you mean models/base?",
        "there is no folder mdoels/code; did you mean models/code? "
        "(for a repository of the Hub, write mdoels/code@main)",
        "there is no folder models/frensh; did you mean models/french?",
        "there is no file data/fr.jsonl; did you mean data/french.jsonl?",
    ]


def test_what_is_misspelt_is_told_as_the_docs_show(merger, folder):
    ((command, lines),) = (
        (command, lines)
        for block in blocks("docs/first-recipe.md", "console")
        for command, lines in commands(block)
        if "models/bse" in command
    )
    assert faults(merger(*command[1:])) == [line.removeprefix("error: ") for line in lines]


REFUSED = [
    (("models/nowhere",), "there is no folder models/nowhere; models has base, code, french"),
    (("./nowhere",), "there is no folder ./nowhere; this folder has data, models"),
    (("/nowhere/at/all",), "there is no folder /nowhere/at/all"),
    (
        ("data/code.jsonl",),
        "data/code.jsonl: is a file, expected the folder of a model; a text is given as --data NAME=data/code.jsonl",
    ),
    (("models",), "models: is no model, but has models: base, code, french"),
    (("models/base",), "models/base: is the base already; name every model once"),
    (("models/code", "again=models/code/"), "models/code/: is expert code already; name every model once"),
    (("a=models/code", "a=models/french"), "a=models/french: the name a is taken; give each expert one of its own"),
    (
        ("b c=models/code",),
        "b c=models/code: an expert's name is letters, digits, _ . -, and not `base`",
    ),
    (("code=",), "an argument is empty, expected a folder"),
    (
        ("models/code", "--data", "data/code.jsonl"),
        "--data data/code.jsonl: expected NAME=FILE, as in --data code=data/code.jsonl",
    ),
    (("models/code", "--data", "code=data"), "data: is a folder, expected a file of text"),
    (("models/code", "--data", "code=data/x.json"), "there is no file data/x.json; data has code.jsonl, french.jsonl"),
    (
        ("models/code", "--data", "code=nothing"),
        "there is no file nothing (for a data set of the Hub, write nothing:train)",
    ),
    (
        ("nowhere",),
        "there is no folder nowhere; this folder has data, models (for a repository of the Hub, write nowhere@main)",
    ),
    (
        ("models/code", "--data", "code=data/code.jsonl", "--data", "code=data/french.jsonl"),
        "--data code=data/french.jsonl: the text of code is data/code.jsonl already",
    ),
    (
        ("models/code", "models/french", "x=org/x", "--data", "code=data/code.jsonl"),
        "--data: no text for french, x; add --data french=FILE --data x=FILE, or leave all texts out",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_wrong_is_told_in_one_line(merger, folder, arguments, message):
    assert faults(merger("init", "models/base", *arguments)) == [message]


def test_a_file_without_text_is_told_before_the_recipe_is_written(merger, folder):
    Path("data/code.jsonl").write_text('{"content": "a"}\n')
    Path("data/french.jsonl").write_text("\n")
    assert faults(merger("init", *MODELS, *TEXTS)) == [
        "data/code.jsonl:1: needs a field messages, prompt or text; found content",
        "data/french.jsonl: has no text; it holds no record",
    ]


def test_an_adapter_is_no_base(merger, folder):
    save_adapter(folder / "chat")
    assert faults(merger("init", "chat", "models/code")) == [
        "base: chat is a PEFT adapter; give the model that it was trained on"
    ]


def test_a_recipe_is_written_only_into_a_folder_that_is_there(merger, folder):
    ran = merger("init", *MODELS, "-o", "nowhere/x.yaml")
    assert (ran.code, ran.err) == (2, "error: --output nowhere/x.yaml: expected a file in a folder that is there\n")


# --- what it stands on ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "near"),
    [("models/code", "models/code"), ("mdels/cdoe", "models/code"), ("models/xyz", None), ("data/code.jsonl", None)],
)
def test_a_near_path_has_the_nearest_name_in_every_part(folder, path, near):
    assert near_path(Path(path), Path.is_dir) == (near and Path(near))


@pytest.mark.parametrize(
    ("name", "expected"), [("org/set", True), ("a:b:c", True), ("set.jsonl", False), ("./x", False)]
)
def test_a_data_set_of_the_hub_is_told_by_its_name(name, expected):
    assert is_dataset(name) is expected
    assert set(TEXT_SUFFIXES) == _READERS.keys()


def test_the_shares_beside_the_number_of_texts_are_those_of_the_benchmark():
    rows = (ROOT / ZOO).read_text().splitlines()
    for share, texts in re.findall(r"(0\.\d+) (?:of the gains )?with (\d+)", SAMPLES_REASON):
        (row,) = [row for row in rows if row.startswith(f"| regmean, {texts} texts |")]
        assert row.endswith(f"| {share} |")
