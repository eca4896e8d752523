"""What a user reads after a usual mistake: the whole text, which names the place and says what to type instead."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from checkpoints import CONFIG, llama, save
from markdown import ROOT
from transformers import AutoConfig, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from merger.cli._terminal import as_flags, program_name
from merger.demo import demo
from merger.engine.merge import merge
from merger.errors import RecipeError
from merger.evaluation.scores import Comparison, Estimate, Row, TaskSummary, objective_text
from merger.evaluation.search import SearchResult
from merger.evaluation.search.loop import Trial
from merger.recipe.json_schema import json_schema
from merger.recipe.recipe import Recipe

RECIPE = """\
base: models/base
experts:
  code: models/code
  french: models/french
method: linear
output: {path: out}
"""
CALIBRATED = """\
calibration:
  data:
    code: data/code.jsonl
    french: data/french.jsonl
"""
EVALUATED = """\
evaluation:
  data:
    code: held/code.jsonl
    french: [held/french.jsonl, {file: held/more.txt}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe with its models and texts; the current folder. The Hub may not be asked."""
    for seed, name in enumerate(("base", "code", "french")):
        save(tmp_path / "models" / name, llama(seed))
    for place in ("data", "held"):
        (tmp_path / place).mkdir()
        for name in ("code.jsonl", "french.jsonl", "more.txt"):
            (tmp_path / place / name).write_text('{"text": "a"}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)
    return tmp_path


def write(*replacements, more=""):
    """The recipe with each ``old, new`` pair replaced."""
    text = RECIPE + more
    for old, new in zip(replacements[::2], replacements[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    Path("recipe.yaml").write_text(text)


def errors(ran, code):
    """The lines of a refusal, which printed nothing else."""
    assert (ran.code, ran.out) == (code, "")
    return [line.removeprefix("error: ") for line in ran.err.splitlines()]


# --- locations that lead nowhere --------------------------------------------------------------------

MODELS_MISSPELT = ("models/base", "models/bse", "models/code", "modles/code", "models/french", "models/frensh")
MODELS_MISSING = [
    "recipe.yaml:1: base: there is no folder models/bse; did you mean models/base?",
    "recipe.yaml:3: experts.code: there is no folder modles/code; did you mean models/code? "
    "(for a repository of the Hub, write modles/code@main)",
    "recipe.yaml:4: experts.french: there is no folder models/frensh; did you mean models/french?",
]


@pytest.mark.parametrize("command", ["run", "plan", "inspect", "lock", "calibrate"])
def test_every_misspelt_model_of_a_recipe_is_told_at_once_with_its_line(merger, folder, command):
    write(*MODELS_MISSPELT)
    assert errors(merger(command, "recipe.yaml"), 3) == MODELS_MISSING


@pytest.mark.parametrize("command", ["eval", "search"])
def test_judging_tells_of_misspelt_models_and_held_out_files_together(merger, folder, command):
    weight = "weight: {search: [0.1, 0.2]}" if command == "search" else "weight: 1"
    write(*MODELS_MISSPELT[:2], "models/code", f"{{model: models/cod, {weight}}}", "held/french", "held/frensh",
          "more.txt", "moar.txt", more=EVALUATED)  # fmt: skip
    assert errors(merger(command, "recipe.yaml"), 3) == [
        MODELS_MISSING[0],
        "recipe.yaml:3: experts.code: there is no folder models/cod; did you mean models/code?",
        "recipe.yaml:10: evaluation.data.french 1: there is no file held/frensh.jsonl; did you mean held/french.jsonl?",
        "recipe.yaml:10: evaluation.data.french 2: file: there is no file held/moar.txt; did you mean held/more.txt?",
    ]


@pytest.mark.parametrize("command", ["run", "plan", "inspect", "lock", "calibrate"])
def test_misspelt_texts_and_statistics_are_told_by_every_command_that_takes_them(merger, folder, command):
    statistics = CALIBRATED.replace("    french: data/french.jsonl\n", "  stats: {french: stats/french.safetensors}\n")
    adapter = "{model: models/base, adapter: ./fr}"
    write("linear", "obim", "data/code", "data/cod", "models/french", adapter, more=statistics)
    assert errors(merger(command, "recipe.yaml"), 3) == [
        "recipe.yaml:4: experts.french.adapter: there is no folder ./fr; this folder has data, held, models",
        "recipe.yaml:9: calibration.data.code: there is no file data/cod.jsonl; did you mean data/code.jsonl?",
        "recipe.yaml:10: calibration.stats.french: there is no file stats/french.safetensors",
    ]


def test_texts_that_no_stage_takes_need_not_be_there(merger, folder):
    write("data/code", "data/cod", more=CALIBRATED)
    assert merger("plan", "recipe.yaml").code == 0


def test_paths_of_a_recipe_elsewhere_start_there(merger, folder, monkeypatch):
    write("models/code", "./models/cod")
    monkeypatch.chdir(folder / "data")
    assert errors(merger("plan", "../recipe.yaml"), 3) == [
        "../recipe.yaml:3: experts.code: there is no folder ./models/cod; did you mean models/code?"
    ]


def test_a_file_in_place_of_a_folder_is_told(merger, folder):
    write("models/code", "models/code/model.safetensors")
    assert errors(merger("plan", "recipe.yaml"), 3) == [
        "recipe.yaml:3: experts.code: models/code/model.safetensors: is a file, expected the folder of a model"
    ]


def test_a_name_without_a_near_folder_is_taken_for_a_repository(merger, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write("models/code", "org/code", "models/french", "gpt2")
    code, french = errors(merger("plan", "recipe.yaml", "--offline"), 3)
    assert code.startswith("code: org/code is neither a folder nor in the Hub cache")
    assert french.startswith("french: gpt2 is neither a folder nor in the Hub cache")


def test_a_repository_in_the_cache_is_none_of_the_folders_near_it(merger, folder, monkeypatch):
    snapshot = folder / "cache" / "models--models--coda" / "snapshots" / ("a" * 40)
    save(snapshot, llama(1))
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    write("models/code", "models/coda")
    assert merger("plan", "recipe.yaml", "--offline").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "lines"),
    [
        (("run", "recipe.yml"), 2, ["recipe.yml: there is no such file; did you mean recipe.yaml?"]),
        (("plan", "nothing"), 2, ["nothing: there is no such file"]),
        (
            ("eval", "recip.yaml", "models/cde"),
            2,
            [
                "recip.yaml: there is no such recipe or folder; did you mean recipe.yaml?",
                "models/cde: there is no such recipe or folder; did you mean models/code?",
            ],
        ),
        (("inspect", "models/coda"), 2, ["models/coda: there is no such recipe or folder; did you mean models/code?"]),
        (
            ("inspect", "models/coda", "--base", "models/bse"),
            3,
            [
                "base: there is no folder models/bse; did you mean models/base?",
                "model: there is no folder models/coda; did you mean models/code?",
            ],
        ),
        (
            ("lora", "models/bse", "models/coda", "-o", "out", "--rank", "1"),
            3,
            [
                "base: there is no folder models/bse; did you mean models/base?",
                "model: there is no folder models/coda; did you mean models/code?",
            ],
        ),
        (
            ("eval", "recipe.yaml", "--data", "a=held/cod.jsonl", "--data", "b=held/french.json"),
            3,
            [
                "a: there is no file held/cod.jsonl; did you mean held/code.jsonl?",
                "b: there is no file held/french.json; did you mean held/french.jsonl?",
            ],
        ),
        (("verify", "model"), 3, ["model: there is no such folder; did you mean models?"]),
        (("push", "model", "org/x"), 3, ["model: there is no such folder; did you mean models?"]),
        (("extract", "model", "a", "-o", "b"), 3, ["model: there is no such folder; did you mean models?"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_an_argument_that_leads_nowhere_is_told_with_its_near_name(merger, folder, arguments, code, lines):
    assert errors(merger(*arguments), code) == lines


@pytest.mark.parametrize("command", ["run", "plan", "inspect", "lock", "calibrate"])
def test_keys_values_and_missing_inputs_of_a_recipe_are_told_together(merger, folder, command):
    write(
        "method: linear", "methd: linear\nseed: -1", "models/code", "models/cod", more=CALIBRATED.replace("h.j", ".j")
    )
    assert errors(merger(command, "recipe.yaml"), 2) == [
        "recipe.yaml: expected a method or a pipeline, found none",
        "recipe.yaml:3: experts.code: there is no folder models/cod; did you mean models/code?",
        "recipe.yaml:5: methd: unknown key; did you mean 'method'?",
        "recipe.yaml:6: seed: is -1, expected at least 0",
        "recipe.yaml:11: calibration.data.french: there is no file data/frenc.jsonl; did you mean data/french.jsonl?",
    ]


def test_missing_inputs_are_told_with_a_fault_of_a_parameter_and_names_of_the_hub_are_not(merger, folder):
    write("base: models/base", "base: org/base", "models/code", "{model: models/base, adapter: ./fr}",
          "method: linear", "method: ties\nparameters: {density: 2}", more=CALIBRATED.replace("h.j", ".j"))  # fmt: skip
    assert errors(merger("plan", "recipe.yaml"), 2) == [
        "recipe.yaml:3: experts.code.adapter: there is no folder ./fr; this folder has data, held, models",
        "recipe.yaml:6: parameters.density: is 2, expected at most 1",
        "recipe.yaml:11: calibration.data.french: there is no file data/frenc.jsonl; did you mean data/french.jsonl?",
    ]


def test_a_location_that_is_none_is_told_once(merger, folder):
    write("models/code", "''", "models/french", "f" * 300)
    assert errors(merger("plan", "recipe.yaml"), 2) == [
        "recipe.yaml:3: experts.code.model: is empty, expected text",
        f"recipe.yaml:4: experts.french.model: is '{'f' * 80}', which no folder can be named",
    ]


def test_missing_inputs_are_told_with_values_that_are_left_open(merger, folder):
    write("models/code", "models/cod", "method: linear", "method: ties\nparameters: {density: {search: [0.1, 0.2]}}")
    assert errors(merger("plan", "recipe.yaml"), 2) == [
        "recipe.yaml:3: experts.code: there is no folder models/cod; did you mean models/code?",
        "recipe.yaml:6: parameters.density: is left open for `merger search`, which writes a recipe with the best "
        "value; or give --set parameters.density=VALUE",
    ]


def test_a_recipe_in_python_tells_faults_and_missing_inputs_together(folder):
    with pytest.raises(RecipeError) as refusal:
        Recipe.parse({**yaml.safe_load(RECIPE), "base": "models/bse", "seed": "one"}, folder)
    assert refusal.value.faults == [
        "recipe: seed: is 'one', expected a whole number",
        "recipe: base: there is no folder models/bse; did you mean models/base?",
    ]


# --- configurations of mergekit, and short forms ----------------------------------------------------

MERGEKIT = """\
merge_method: ties
base_model: models/base
models:
  - {model: models/code, parameters: {weight: 1e-3, density: 010}}
  - {model: models/french}
dtype: bfloat16
"""
MIXTURE = """\
base_model: models/base
gate_mode: hidden
experts:
  - {source_model: models/code, positive_prompts: [code]}
  - {source_model: models/french, positive_prompts: [french]}
"""
RECIPE_COMMANDS = ["run", "plan", "inspect", "lock", "calibrate", "eval", "search"]


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_a_mergekit_configuration_is_told_in_a_line_with_the_command_that_imports_it(merger, folder, command):
    Path("my config.yml").write_text(MERGEKIT)
    assert errors(merger(command, "my config.yml"), 2) == [
        "my config.yml: is a mergekit configuration, not a recipe; make it one with: "
        "merger import 'my config.yml' -o 'my config-recipe.yaml'"
    ]


def test_the_command_that_is_told_for_a_mergekit_configuration_makes_a_recipe_that_plans(merger, folder):
    sound = MERGEKIT.replace("010", "0.5").replace("1e-3", "1.0")
    Path("ties.yml").write_text(f"{sound}parameters: {{weight: 1.0, density: 0.5}}\n")
    (line,) = errors(merger("plan", "ties.yml"), 2)
    _, *arguments = line.partition("make it one with: ")[2].split()
    assert merger(*arguments).code == 0
    assert merger("plan", "ties-recipe.yaml").code == 0


@pytest.mark.parametrize("command", [*RECIPE_COMMANDS, "import"])
def test_a_mergekit_moe_configuration_is_told_in_a_line(merger, folder, command):
    Path("moe.yaml").write_text(MIXTURE)
    assert errors(merger(command, "moe.yaml"), 2) == [
        "moe.yaml: is a mergekit-moe configuration; merger makes no mixture of experts, so merger import has no "
        "equivalent; merger init BASE EXPERT... writes a recipe that merges the same models into one"
    ]


def test_a_recipe_needs_no_import(merger, folder):
    assert errors(merger("import", "recipe.yaml"), 2) == [
        "recipe.yaml: is a recipe of merger already; merger plan recipe.yaml"
    ]


NAMED = "experts:\n  code: models/code\n  french: models/french\n"
SHORT = "experts: [models/code, models/french/]\n"


def test_a_list_of_experts_and_an_output_path_are_the_recipe_spelled_out(folder):
    names = Recipe.parse(RECIPE.replace("models/french", "models/french/"), folder)
    short = Recipe.parse(RECIPE.replace(NAMED, SHORT).replace("{path: out}", "out"), folder)
    assert short.spelled_out() == names.spelled_out()


def test_short_forms_merge_to_the_same_bytes_and_the_same_record(merger, folder):
    assert merger("run", "recipe.yaml").code == 0
    write(NAMED, SHORT.replace("french/", "french"), "{path: out}", "short")
    assert merger("run", "recipe.yaml").code == 0
    assert Path("out/model.safetensors").read_bytes() == Path("short/model.safetensors").read_bytes()
    records = [json.loads(Path(place, "merger.json").read_text())["recipe"] for place in ("out", "short")]
    assert [{**record, "output": {**record["output"], "path": ""}} for record in records] == [
        {**records[0], "output": {**records[0]["output"], "path": ""}}
    ] * 2


def test_short_forms_are_in_the_schema(folder):
    recipe = yaml.safe_load(RECIPE.replace(NAMED, SHORT).replace("{path: out}", "out"))
    jsonschema.validate(recipe, json_schema())


def test_set_changes_an_expert_of_a_list_by_its_name(folder):
    write(NAMED, SHORT, "{path: out}", "out")
    recipe = Recipe.load("recipe.yaml", ["experts.code=models/base", "output.path=elsewhere"])
    assert [expert.model for expert in recipe.experts.values()] == ["models/base", "models/french/"]
    assert recipe.output.path == "elsewhere"


def test_an_expert_of_a_list_is_told_with_its_name_and_line(merger, folder):
    write(NAMED, "experts:\n- models/code\n- models/frensh\n")
    assert errors(merger("plan", "recipe.yaml"), 3) == [
        "recipe.yaml:4: experts.frensh: there is no folder models/frensh; did you mean models/french?"
    ]


@pytest.mark.parametrize(
    ("experts", "fault"),
    [
        (
            "[a/final, b/final]",
            "the last parts of their folders are alike; give them names, as in "
            "experts: {final: a/final, final-2: b/final}",
        ),
        ("models/code", "is 'models/code', expected experts by name or in a list, as in experts: [models/code]"),
        (
            "[{code: models/code}]",
            "expected experts by name, as in experts: {code: models/code, french: models/french}",
        ),
        ("[]", "expected experts by name, as in experts: {code: models/code, french: models/french}"),
    ],
)
def test_experts_without_clear_names_are_told_with_an_example(merger, folder, experts, fault):
    write(NAMED, f"experts: {experts}\n")
    assert errors(merger("plan", "recipe.yaml"), 2) == [f"recipe.yaml:2: experts: {fault}"]


def test_an_output_that_is_a_number_is_told_with_an_example(merger, folder):
    write("{path: out}", "7")
    assert errors(merger("plan", "recipe.yaml"), 2) == [
        "recipe.yaml:6: output: is 7, expected a folder, as in output: out; put a name in quotes"
    ]


# --- models of another kind -------------------------------------------------------------------------


def neox(path):
    """A checkpoint with the names of another architecture."""
    names = {name: f"gpt_neox.{name.removeprefix('model.')}" for name in llama(1)}
    tensors = {names[name]: tensor for name, tensor in llama(1).items()}
    save(path, tensors, {**CONFIG, "model_type": "gpt_neox"})


@pytest.mark.parametrize("command", ["plan", "run", "inspect", "lock"])
def test_an_expert_of_another_architecture_is_told_in_a_line(merger, folder, command):
    neox("models/code")
    assert errors(merger(command, "recipe.yaml"), 3) == [
        "code is gpt_neox, base is llama; experts are fine-tunes of the base"
    ]


def test_an_expert_of_another_size_is_told_in_a_line(merger, folder):
    save("models/code", llama(1, hidden=6, layers=3), {**CONFIG, "hidden_size": 6, "num_hidden_layers": 3})
    save("models/base", llama(0), {**CONFIG, "hidden_size": 4, "num_hidden_layers": 2})
    save("models/french", llama(2), {**CONFIG, "hidden_size": 4, "num_hidden_layers": 2})
    assert errors(merger("plan", "recipe.yaml"), 3) == [
        "code is llama with num_hidden_layers 3, hidden_size 6, base with num_hidden_layers 2, hidden_size 4; "
        "experts are fine-tunes of the base"
    ]


def test_misfits_of_other_experts_are_told_beside_an_architecture(merger, folder):
    neox("models/code")
    tensors = llama(2)
    del tensors["model.norm.weight"]
    save("models/french", tensors)
    assert errors(merger("plan", "recipe.yaml"), 3) == [
        "code is gpt_neox, base is llama; experts are fine-tunes of the base",
        "french: has no model.norm.weight; set `missing: zero` to leave such tensors at the base, or name them in a "
        "rule {tensors: ..., use: base}",
    ]


def test_another_type_with_the_same_tensors_is_no_fault(merger, folder):
    save("models/code", llama(1), {**CONFIG, "model_type": "mistral"})
    assert merger("plan", "recipe.yaml").code == 0


@pytest.mark.parametrize("command", ["plan", "run", "inspect", "lock"])
def test_gguf_is_told_with_what_to_merge_in_its_place(merger, folder, command):
    for file in Path("models/code").iterdir():
        file.unlink()
    Path("models/code/code-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert errors(merger(command, "recipe.yaml"), 3) == [
        "code: models/code holds code-Q4_K_M.gguf, weights in GGUF, which is made for inference and is not merged; "
        "merge the safetensors folder that it was made from, and convert the result again"
    ]
    write("models/code", "models/code/code-Q4_K_M.gguf", "models/french", "models/frensh")
    assert errors(merger(command, "recipe.yaml"), 3) == [
        "recipe.yaml:3: experts.code: models/code/code-Q4_K_M.gguf: is a file in GGUF, which is made for inference and "
        "is not merged; merge the safetensors folder that it was made from, and convert the result again",
        "recipe.yaml:4: experts.french: there is no folder models/frensh; did you mean models/french?",
    ]


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        ("config.json", {"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ("model_index.json", [], "model"),
    ],
)
def test_a_model_of_diffusers_is_told_with_what_merges_its_tensors(merger, folder, file, content, kind):
    Path("models/base/config.json").unlink()
    Path("models/base/model.safetensors").rename("models/base/diffusion_pytorch_model.safetensors")
    Path("models/base", file).write_text(json.dumps(content))
    assert errors(merger("plan", "recipe.yaml"), 3) == [
        f"base: models/base is a {kind} of diffusers, and merger merges models of transformers; in Python, "
        "merger.merge_tensors merges the tensors of any safetensors files"
    ]


def encoder_decoder(kind):
    """The models of the recipe as those of an architecture with an encoder and a decoder."""
    config = AutoConfig.for_model(
        kind, vocab_size=64, d_model=8, d_ff=16, d_kv=4, num_layers=1, num_heads=2, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for seed, name in enumerate(("base", "code", "french")):
        torch.manual_seed(seed)
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(f"models/{name}")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_plan_tells_under_which_limits_an_encoder_with_a_decoder_is_merged(merger, folder, kind):
    encoder_decoder(kind)
    ran = merger("plan", "recipe.yaml")
    sentence = (
        f"note: base is {kind}, with an encoder and a decoder: methods without text merge it, "
        "but calibration and merger eval do not run it"
    )
    assert (ran.code, ran.out.splitlines().count(sentence)) == (0, 1)
    assert merger("run", "recipe.yaml").code == 0
    models = [AutoModelForSeq2SeqLM.from_pretrained(name).state_dict() for name in ("models/code", "models/french")]
    merged = AutoModelForSeq2SeqLM.from_pretrained("out").state_dict()
    for name, values in merged.items():
        torch.testing.assert_close(values, (models[0][name] + models[1][name]) / 2)


@pytest.mark.parametrize("command", ["plan", "run", "lock", "calibrate"])
def test_a_method_that_needs_text_is_refused_for_an_encoder_with_a_decoder(merger, folder, command):
    encoder_decoder("t5")
    write("linear", "obim", more=CALIBRATED)
    assert errors(merger(command, "recipe.yaml"), 3) == [
        "base is t5, with an encoder and a decoder, which calibration does not run; take a method that needs no text, "
        "such as wudi_svc (merger methods lists them)"
    ]


def test_names_of_dtypes_in_other_tools_are_told_with_the_near_one(merger, folder):
    for name, near in {"fp16": "float16", "half": "float16", "fp32": "float32", "bf16": "bfloat16"}.items():
        write("{path: out}", f"{{path: out, dtype: {name}}}")
        assert errors(merger("plan", "recipe.yaml"), 2) == [
            f"recipe.yaml:6: output.dtype: is '{name}', expected 'float64', 'float32', 'bfloat16' or 'float16'; "
            f"did you mean '{near}'?"
        ]


# --- options, as Python and the command line write them ----------------------------------------------


def test_an_occupied_output_names_the_option_as_it_is_typed(merger, folder):
    Path("out").mkdir()
    Path("out/note.txt").write_text("mine")
    sentence = "recipe.yaml:6: output.path: {}/out is there already; choose another folder, or replace it with {}"
    with pytest.raises(RecipeError) as refusal:
        merge(Recipe.load("recipe.yaml"))
    assert str(refusal.value) == sentence.format(folder, "force=True")
    assert errors(merger("run", "recipe.yaml"), 2) == [sentence.format(folder, "--force")]


def messages_of(path):
    """The texts in calls and formatted strings of a module, without commands that are written out."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call | ast.JoinedStr)]
    parts = [part.value for node in nodes for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return [re.sub(r"merger \w+ --[a-z-]+", "", part) for part in parts if isinstance(part, str)]


def test_no_message_of_the_library_names_a_flag_of_a_command():
    package = ROOT / "merger"
    terminal = [*package.glob("cli/*.py"), package / "inspection" / "console.py"]  # which print for commands alone
    library = sorted(set(package.rglob("*.py")) - set(terminal))
    flags = [text for path in library for text in messages_of(path) if re.search(r"(?<!\S)--[a-z](?!\w*:)", text)]
    assert flags == []


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("say public=True if that is meant", "say --public if that is meant"),
        ("device='cuda:9': no such", "--device cuda:9: no such"),
        ("another with to=FOLDER, or force=True", "another with --to, or --force"),
        ("max_memory=SIZE: too little", "--max-memory: too little"),
        ("give data=FILES or lm_eval=TASKS", "give --data or --lm-eval"),
        ("picture='norm': no such tensor", "--tensor norm: no such tensor"),
        ("overrides='seed': is text", "--set seed: is text"),
        ("fail_if='overlap > 0.3': holds", "--fail-if 'overlap > 0.3': holds"),
        ("models/force=Trueish and enforce=True", "models/force=Trueish and enforce=True"),
    ],
)
def test_options_of_python_become_flags(text, flags):
    assert as_flags(text) == flags


# --- what to type next ------------------------------------------------------------------------------


def test_a_pack_says_at_the_end_of_a_run_what_loads_it(merger, folder):
    write("linear", "emr")
    ran = merger("run", "recipe.yaml")
    command = f"merger extract {folder}/out code -o {folder}/out-code"
    assert ran.out.splitlines()[1:] == [
        f"it packs code, french, which transformers does not load; write one that it does with: {command}"
    ]
    assert merger(*command.split()[1:]).code == 0


def test_a_merge_ends_with_the_command_that_shows_what_each_expert_gave(merger, folder):
    assert merger("run", "recipe.yaml").out.splitlines()[1:] == [
        f"transformers loads it as it is; see what each expert gave: merger inspect {folder}/out"
    ]
    assert merger("inspect", f"{folder}/out").code == 0


def test_a_merge_with_held_out_examples_ends_with_the_command_that_judges_it(merger, folder):
    Path("recipe.yaml").rename("my recipe.yaml")
    Path("my recipe.yaml").write_text(RECIPE + EVALUATED)
    ran = merger("run", "my recipe.yaml", "--set", "output.dtype=bfloat16")
    assert ran.out.splitlines()[1:] == [
        "transformers loads it as it is; see what it kept of each expert: "
        "merger eval 'my recipe.yaml' --set output.dtype=bfloat16"
    ]


def test_quiet_leaves_out_what_to_type_next(merger, folder):
    write("linear", "emr")
    assert len(merger("run", "recipe.yaml", "--quiet").out.splitlines()) == 1


def test_the_program_is_typed_by_its_path_where_the_shell_does_not_find_it(tmp_path, monkeypatch):
    program = tmp_path / "a b" / "merger"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(program)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program_name() == f"'{program}'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert program_name() == "merger"


def test_the_demo_leaves_the_output_of_its_recipe_free(tmp_path):
    recipe = Recipe.load(demo.prepare(tmp_path / "demo"))
    outputs = [demo.merge_folder(tmp_path / "demo", method) for method in demo.METHODS]
    assert recipe.folder / recipe.output.path not in outputs


# --- locks ------------------------------------------------------------------------------------------


def test_a_damaged_record_of_a_locked_output_is_told_with_what_to_type(merger, folder):
    for command in ("lock", "run"):
        assert merger(command, "recipe.yaml").code == 0
    Path("out/merger.json").write_text("{")
    ran = merger("run", "recipe.yaml", "--locked")
    assert (ran.code, ran.err.splitlines()) == (
        2,
        [
            "note: " + str(folder / "out/merger.json") + ": cannot be read: Expecting property name enclosed in double "
            "quotes: line 1 column 2 (char 1), so the output is not taken for finished",
            f"error: recipe.yaml:6: output.path: {folder}/out is there already; choose another folder, or replace it "
            "with --force",
        ],
    )


def lock_with(**versions):
    lock = json.loads(Path("recipe.lock").read_text())
    Path("recipe.lock").write_text(json.dumps({**lock, "versions": {**lock["versions"], **versions}}))
    return lock["versions"]


def test_an_allowed_version_is_waived_and_recorded(merger, folder):
    merger("lock", "recipe.yaml")
    version = lock_with(torch="0.1")["torch"]
    sentence = f'recipe.lock: versions.torch was "0.1" when it was locked, and is "{version}"'
    assert errors(merger("run", "recipe.yaml", "--locked"), 2)[0] == sentence
    ran = merger("run", "recipe.yaml", "--locked", "--allow-versions", "torch")
    assert (ran.code, ran.err) == (0, f"note: {sentence}, as allowed\n")
    assert json.loads(Path("out/merger.json").read_text())["notes"] == [f"{sentence}, as allowed"]
    assert "nothing to do" in merger("run", "recipe.yaml", "--locked", "--allow-versions", "torch").out


def test_only_the_versions_that_are_named_are_waived(merger, folder):
    merger("lock", "recipe.yaml")
    version = lock_with(torch="0.1", numpy="0.2")["numpy"]
    assert errors(merger("run", "recipe.yaml", "--locked", "--allow-versions", "torch"), 2) == [
        f'recipe.lock: versions.numpy was "0.2" when it was locked, and is "{version}"',
        "recipe.lock: lock the recipe again if that is meant",
    ]


def test_a_package_that_no_lock_names_is_told_with_the_near_one(merger, folder):
    merger("lock", "recipe.yaml")
    assert errors(merger("run", "recipe.yaml", "--locked", "--allow-versions", "troch"), 2) == [
        "--allow-versions troch: is no package of recipe.lock; did you mean 'torch'?"
    ]
    assert errors(merger("run", "recipe.yaml", "--allow-versions", "torch"), 2) == [
        "--allow-versions: is about what --locked would refuse; say both"
    ]


# --- adapters and searches ----------------------------------------------------------------------------


def fine_tune(matrices, vectors):
    """A LLaMA model in models/tuned whose matrices and norms differ from the base's by random values of these sizes."""
    base = LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    ))  # fmt: skip
    base.save_pretrained("models/base")
    torch.manual_seed(1)
    for name, values in base.named_parameters():
        size = vectors if values.dim() == 1 else matrices * ("embed" not in name)
        values.data += size * torch.randn_like(values)
    base.save_pretrained("models/tuned")


def omission(merger, rank):
    ran = merger("lora", "models/base", "models/tuned", "-o", "adapter", "--rank", rank, "--force")
    assert ran.code == 0
    return [line for line in ran.err.splitlines() if "omits" in line]


def test_an_adapter_that_omits_most_of_the_change_is_told_with_a_remedy(merger, folder):
    fine_tune(matrices=1, vectors=0)
    assert omission(merger, 1) == [
        "note: the adapter omits 78% of the squared change, 0% in tensors that are no matrix of a layer; "
        "a higher rank keeps more"
    ]
    assert omission(merger, 16) == []
    fine_tune(matrices=0.01, vectors=1)
    assert omission(merger, 16) == [
        "note: the adapter omits 100% of the squared change, 100% in tensors that are no matrix of a layer; "
        "no rank keeps it; push or merge the model itself"
    ]


@pytest.mark.parametrize(
    ("name", "text"), [("loss", "1.2500"), ("prose", "1.2500"), ("quiz", "-1.2500"), ("kept", "-1.2500")]
)
def test_a_search_prints_a_loss_as_a_loss(name, text):
    assert objective_text(name, -1.25, {"prose": "loss", "quiz": "accuracy"}) == text


def test_a_comparison_and_a_search_are_short_in_a_notebook():
    estimate = Estimate(0.5, 0.4, 0.6)
    tasks = {"prose": TaskSummary("loss", 2, "0")}
    row = Row("merged", "merge", "", {"prose": estimate}, estimate, {}, estimate, None, (), {})
    comparison = Comparison(tasks, {}, (row,), "float32", {}, ())
    assert repr(comparison) == "Comparison(merged on prose)"
    cells = re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", comparison._repr_html_())
    assert cells == ["model", "prose", "kept", "merged", "0.5000", "0.500"]
    trial = Trial("", 1, {}, -1.25, {"prose": 1.25}, 0.0, 0.0, None)
    result = SearchResult("recipe.search", "loss", {"": (trial,)}, {"": trial}, comparison)
    assert repr(result) == "SearchResult(1 trials; loss 1.2500 at best; recipe.search)"
    assert result._repr_html_() == comparison._repr_html_()
