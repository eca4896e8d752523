"""What a recipe may say, how it is kept, and how all that is wrong with it is told at once."""

import json
from fractions import Fraction
from pathlib import Path

import jsonschema
import pytest
import yaml

from merger.errors import RecipeError
from merger.pipeline.parameters import Place
from merger.pipeline.stages import bind, expand
from merger.recipe.json_schema import json_schema
from merger.recipe.recipe import Recipe
from merger.recipe.sections import byte_size

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
MINIMAL = """\
base: models/base
experts: {lm: models/lm, math: models/math, code: models/code}
method: linear
output: {path: out}
"""
FULL = """\
base: meta-llama/Llama-2-13b-hf
experts:
  lm:   WizardLMTeam/WizardLM-13B-V1.2
  math: {model: org/name@revision, weight: 1.0}
  code: {model: org/base, adapter: path/or/repo}
method: obim
parameters: {density: {lm: 0.4, math: 0.45, code: 0.1}, order: {last: code}}
rules:
  - {tensors: "embed_tokens|lm_head", method: linear}
  - {tensors: "rotary", use: base}
calibration: {data: {lm: lm.jsonl, math: math.jsonl, code: code.jsonl}, samples: 100, max_tokens: 2048}
output: {path: out/obim-13b, dtype: bfloat16, shard_size: 5GB}
seed: 0
"""


def minimal(**changed):
    return Recipe.parse({**yaml.safe_load(MINIMAL), **changed})


def settled(choice, experts=("lm", "math", "code"), depth=0):
    """The stages of a choice as they are for one matrix at that depth."""
    place = Place(tuple(experts), depth=Fraction(depth))
    return [bind(expansion, place) for stage in choice.stages for expansion in expand(stage, "linear", place.experts)]


def names(choice):
    return [bound.entry.name for bound in settled(choice)]


def first(choice, parameter, depth=0):
    return settled(choice, depth=depth)[0].values[parameter]


# --- what it may say ------------------------------------------------------------------------------


def test_the_recipe_of_the_design_is_understood():
    recipe = Recipe.parse(FULL)

    assert recipe.base.model == "meta-llama/Llama-2-13b-hf"
    assert list(recipe.experts) == ["lm", "math", "code"]
    assert (recipe.experts["math"].model, recipe.experts["math"].weight) == ("org/name@revision", 1)
    assert (recipe.experts["code"].model, recipe.experts["code"].adapter) == ("org/base", "path/or/repo")
    assert recipe.rules[1].use == "base"
    assert recipe.calibration.data["math"] == "math.jsonl"
    assert (recipe.output.dtype, recipe.output.shard_size) == ("bfloat16", 5_000_000_000)
    assert first(recipe, "density") == [Fraction(2, 5), Fraction(9, 20), Fraction(1, 10)]


def test_a_base_may_have_an_adapter_too():
    base = minimal(base={"model": "org/base", "adapter": "org/lora"}).base
    assert (base.model, base.adapter) == ("org/base", "org/lora")


def test_a_pipeline_is_a_list_of_stages():
    recipe = minimal(method=None, pipeline=[{"top": {"density": 0.25, "exclusive": {"last": "code"}}}, "sum"])
    assert names(recipe) == ["top", "sum"]


def test_a_score_as_a_stage_keeps_its_highest():
    recipe = minimal(method=None, pipeline=[{"magnitude": {"density": 0.25}}, "sum"])

    top, _ = settled(recipe)
    assert (top.entry.name, top.score.entry.name) == ("top", "magnitude")
    assert top.values["density"] == [Fraction(1, 4)] * 3


def test_a_score_as_a_stage_takes_its_own_parameters_and_those_of_top():
    recipe = minimal(
        method=None,
        pipeline=[{"obm": {"density": 0.25, "hessian": "mean_square"}}, "sum"],
        calibration={"data": "text.jsonl"},
    )
    assert settled(recipe)[0].score.values["hessian"] == "mean_square"


@pytest.mark.parametrize(
    ("rule", "name", "kind", "matches"),
    [
        ({"tensors": "q_proj|k_proj"}, "layers.0.k_proj.weight", "linear", True),
        ({"tensors": "^k_proj"}, "layers.0.k_proj.weight", "linear", False),
        ({"kinds": ["vector", "buffer"]}, "norm.weight", "vector", True),
        ({"kinds": ["vector", "buffer"]}, "norm.weight", "linear", False),
        ({"tensors": "norm", "kinds": ["vector"]}, "norm.weight", "vector", True),
        ({"tensors": "norm", "kinds": ["vector"]}, "norm.weight", "linear", False),
    ],
)
def test_a_rule_matches_by_expression_and_by_kind(rule, name, kind, matches):
    (checked_rule,) = minimal(rules=[{**rule, "use": "math"}]).rules
    assert checked_rule.matches(name, kind) is matches


def test_a_rule_may_have_a_method_a_pipeline_or_a_model_to_copy():
    recipe = minimal(
        rules=[
            {"tensors": "a", "method": "ties", "parameters": {"density": 0.5}},
            {"tensors": "b", "pipeline": [{"random": {"density": 0.5}}, "mean"]},
            {"tensors": "c", "use": "code"},
        ]
    )

    ties, pipeline, use = recipe.rules
    assert names(ties) == ["top", "sign_elect", "scale"]
    assert names(pipeline) == ["random", "mean"]
    assert (use.use, use.stages) == ("code", ())


@pytest.mark.parametrize(
    ("value", "depth", "weights"),
    [
        (0.1, 0, ["1/10"] * 3),
        (2, 0, [2, 2, 2]),
        ("1/3", 0, ["1/3"] * 3),
        ("1e-3", 0, ["1/1000"] * 3),
        ([1, 2], "1/3", ["4/3"] * 3),
        ([2, 1, 0.5], "3/4", ["3/4"] * 3),
        ({"lm": 1, "math": 0.29, "code": [0, "1/3"]}, 1, [1, "29/100", "1/3"]),
    ],
)
def test_a_number_is_one_or_by_expert_or_over_depth_and_kept_as_written(value, depth, weights):
    recipe = minimal(parameters={"weight": value})
    assert first(recipe, "weight", depth) == [Fraction(weight) for weight in weights]


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("5GB", 5_000_000_000),
        ("500 MiB", 500 << 20),
        ("1.5GiB", 3 << 29),
        ("2k", 2000),
        ("0.3 TB", 300_000_000_000),
    ],
)
def test_a_size_is_bytes_or_has_a_unit(value, size):
    assert byte_size(value) == size
    assert minimal(output={"path": "out", "shard_size": value}).output.shard_size == size


@pytest.mark.parametrize("text", ["5 gigs", "GB", ".", "1.2.3MB", "-5MB", "1e9", "1XB"])
def test_what_is_no_size_is_left_as_it_is(text):
    assert byte_size(text) == text


def test_paths_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(MINIMAL)
    (tmp_path / "models" / "lm").mkdir(parents=True)

    recipe = Recipe.load(tmp_path / "recipe.yaml")

    assert recipe.folder == tmp_path
    assert recipe.folders() == [tmp_path / "models" / "lm"]


def test_an_output_must_spare_the_recipe_its_data_and_its_statistics(tmp_path):
    for name in ("data.jsonl", "math.stats"):
        (tmp_path / name).touch()
    calibration = {"data": {"lm": "data.jsonl", "code": "not-here"}, "stats": {"math": "math.stats"}}

    recipe = Recipe.parse({**yaml.safe_load(MINIMAL), "calibration": calibration}, tmp_path)

    assert recipe.surroundings() == [tmp_path, tmp_path / "data.jsonl", tmp_path / "math.stats"]


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        minimal().seed = 3


# --- sources of text ------------------------------------------------------------------------------

GSM8K = {"file": "gsm8k.jsonl", "samples": 50, "fields": {"prompt": "question", "target": "answer"}}
MBPP = {"file": "mbpp.jsonl", "samples": 50, "fields": {}}
PLAIN = {"samples": None, "fields": {}}


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        ("a.jsonl", {"lm": [{"file": "a.jsonl", **PLAIN}], "math": [{"file": "a.jsonl", **PLAIN}]}),
        (["a.jsonl", MBPP], {"lm": [{"file": "a.jsonl", **PLAIN}, MBPP]}),
        ({"lm": "a.jsonl", "math": GSM8K, "code": [GSM8K, MBPP, "a.jsonl"]}, {
            "lm": [{"file": "a.jsonl", **PLAIN}], "math": [GSM8K], "code": [GSM8K, MBPP, {"file": "a.jsonl", **PLAIN}],
        }),
    ],
)  # fmt: skip
def test_calibration_data_is_a_file_or_sources_for_all_experts_or_for_each(data, sources):
    recipe = minimal(calibration={"data": data})
    by_expert = {name: [source.model_dump() for source in recipe.calibration.sources(name)] for name in sources}
    assert by_expert == sources


def test_a_recipe_with_sources_is_spelled_out_and_read_again():
    recipe = minimal(
        calibration={"data": {"lm": [GSM8K, "a.jsonl"], "math": "m.jsonl", "code": MBPP}},
        evaluation={"data": {"lm": [GSM8K, MBPP], "quiz": {"file": "q.jsonl", "fields": {"choices": "endings"}}}},
    )
    content = json.loads(json.dumps(recipe.spelled_out()))

    assert content["calibration"]["data"] == {"lm": [GSM8K, "a.jsonl"], "math": "m.jsonl", "code": MBPP}
    assert Recipe.parse(content).spelled_out() == content


def test_an_output_must_spare_every_source(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).touch()
    sections = {
        "calibration": {"data": {"lm": ["a.jsonl", {"file": "b.jsonl"}]}},
        "evaluation": {"data": {"lm": [{"file": "c.jsonl"}]}},
    }
    recipe = Recipe.parse({**yaml.safe_load(MINIMAL), **sections}, tmp_path)
    assert recipe.surroundings() == [tmp_path, *(tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))]


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ("calibration: {data: {lm: {fil: a}}}", "calibration.data.lm.file: is missing"),
        ("calibration: {data: {lm: {fil: a}}}", "calibration.data.lm.fil: unknown key; did you mean 'file'?"),
        ("calibration: {data: {lm: [{file: a, sample: 3}]}}", "data.lm 1: sample: unknown key; did you mean"),
        ("calibration: {data: [{file: a, samples: 0}]}", "calibration.data 1: samples: is 0, expected at least 1"),
        ("calibration: {data: {lm: []}}", "calibration.data.lm: is [], expected at least 1 of them"),
        ("calibration: {data: {lm: 7}}", "calibration.data.lm: is 7, expected text; put it in quotes"),
        ("calibration: {data: {l: a}}", "calibration.data.l: there is no such expert; did you mean 'lm'?"),
        (
            "calibration: {data: {lm: {file: a, fields: {promt: question}}}}",
            "fields.promt: is 'promt', expected 'text', 'prompt', 'messages', 'target', 'answer' or 'choices'; did you",
        ),
        ("evaluation: {data: {lm: {file: a, sampels: 3}}}", "evaluation.data.lm.sampels: unknown key; did you mean"),
        ("evaluation: {data: {}}", "evaluation.data: is {}, expected at least 1 of them"),
    ],
)
def test_what_is_wrong_with_a_source_is_told_with_its_line(section, fault):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(f"{MINIMAL}{section}\n")
    assert any(message.startswith("recipe:5: ") and fault in message for message in caught.value.faults), caught.value


# --- what is wrong --------------------------------------------------------------------------------


def test_all_faults_are_told_at_once_in_the_order_of_their_lines(tmp_path):
    (tmp_path / "wrong.yaml").write_text("""\
base: {modle: x}
experts:
  a: models/a
  b: {model: models/b, weight: heavy}
method: ties
parameters:
  density: {a: 1.5, c: 0.3}
  lamda: 1
rules:
  - {tensors: "(", use: d}
  - tensors: norm
    pipeline:
      - tpo: {density: 0.5}
      - sum: {weight: .nan}
missing: never
output:
  path: out
  dtype: fp16
sed: 0
""")

    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / "wrong.yaml")

    faults = [fault.removeprefix(f"{tmp_path}/") for fault in caught.value.faults]
    places = [
        "wrong.yaml:1: base.model: ",
        "wrong.yaml:1: base.modle: ",
        "wrong.yaml:4: experts.b.weight: ",
        "wrong.yaml:7: parameters.density.a: ",
        "wrong.yaml:7: parameters.density: there is no expert 'c'",
        "wrong.yaml:8: parameters.lamda: ",
        "wrong.yaml:10: rule 1 (tensors: (): tensors: ",
        "wrong.yaml:10: rule 1 (tensors: (): use: ",
        "wrong.yaml:13: rule 2 (tensors: norm): stage 1: tpo: ",
        "wrong.yaml:14: rule 2 (tensors: norm): stage 2: sum.weight: ",
        "wrong.yaml:15: missing: ",
        "wrong.yaml:18: output.dtype: ",
        "wrong.yaml:19: sed: ",
    ]
    assert [fault[: len(place)] for fault, place in zip(faults, places, strict=True)] == places
    assert str(caught.value).splitlines() == caught.value.faults


def test_a_fault_that_two_kinds_of_tensor_share_is_told_once():
    with pytest.raises(RecipeError) as caught:
        minimal(parameters={"weight": {"lm": 1, "math": -2, "code": 1}})
    assert caught.value.faults == ["recipe: method: the weights sum to zero, so there is no mean"]


def test_a_fault_at_some_depth_only_is_found():
    with pytest.raises(RecipeError, match="sum to zero"):
        minimal(parameters={"weight": [1, -1]})


def test_an_experts_own_weight_counts_when_weights_are_judged():
    experts = {"lm": "a", "math": {"model": "b", "weight": -1}}
    with pytest.raises(RecipeError, match="sum to zero"):
        minimal(experts=experts)
    minimal(experts=experts, parameters={"weight": {"lm": 1, "math": 2}})


def test_a_recipe_from_a_dictionary_has_the_same_faults_without_lines():
    with pytest.raises(RecipeError, match=r"^recipe: method: there is no method 'liner'; did you mean 'linear'\?$"):
        minimal(method="liner")


# --- overrides ------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL + "rules: [{tensors: a, use: base}]\n")
    return path


@pytest.mark.parametrize(
    ("override", "look", "value"),
    [
        ("seed=3", lambda r: r.seed, 3),
        ("output.path=elsewhere", lambda r: r.output.path, "elsewhere"),
        ("output.path=a=b", lambda r: r.output.path, "a=b"),
        ("output.shard_size=2MB", lambda r: r.output.shard_size, 2_000_000),
        ("output.dtype=null", lambda r: r.output.dtype, None),
        ("parameters.weight={lm: 1, math: 2, code: 0.5}", lambda r: first(r, "weight"), [1, 2, 0.5]),
        ("experts.more=models/more", lambda r: list(r.experts), ["lm", "math", "code", "more"]),
        ("rules.0.use=math", lambda r: r.rules[0].use, "math"),
        ("rules.0.tensors=[ab]|c", lambda r: r.rules[0].tensors, "[ab]|c"),  # no YAML, so text
        ("rules=[]", lambda r: r.rules, []),
    ],
)
def test_set_overrides_one_key_with_a_typed_value(file, override, look, value):
    assert look(Recipe.load(file, [override])) == value


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("parameters.weight.lm=1/3", "parameters.weight: has no value for math, code"),
        ("experts.lm.weight=2", "experts.lm.model: is missing"),
        ("seed=three", "seed: is 'three', expected a whole number"),
    ],
)
def test_what_set_makes_wrong_is_a_fault_of_that_key(file, override, fault):
    with pytest.raises(RecipeError, match=fault):
        Recipe.load(file, [override])


def test_overrides_are_recorded_in_order(file):
    recipe = Recipe.load(file, ["seed=3", "seed=4"])
    assert recipe.overrides == ("seed=3", "seed=4")
    assert recipe.seed == 4


# --- spelled out, and for editors -----------------------------------------------------------------


def test_every_default_is_spelled_out():
    content = Recipe.parse(MINIMAL).spelled_out()

    assert content["parameters"] == {"weight": 1, "normalize": True}
    assert content["experts"]["lm"] == {"model": "models/lm", "adapter": None, "weight": 1}
    assert content["output"]["shard_size"] == 5_000_000_000
    assert (content["missing"], content["extra_rows"], content["seed"]) == ("error", "keep", 0)


def test_exact_fractions_survive_being_spelled_out():
    content = minimal(parameters={"weight": {"lm": "1/3", "math": 0.29, "code": 1}}).spelled_out()
    assert content["parameters"]["weight"] == {"lm": "1/3", "math": 0.29, "code": 1}


def test_recipes_are_shipped():
    assert len(SHIPPED) >= 8


shipped = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


@shipped
def test_what_is_spelled_out_says_the_same(path):
    recipe = Recipe.load(path)
    content = json.loads(json.dumps(recipe.spelled_out()))

    reparsed = Recipe.parse(content)

    assert reparsed.spelled_out() == content
    for choice, reparsed_choice in zip(recipe.choices().values(), reparsed.choices().values(), strict=True):
        assert settled(choice, recipe.experts) == settled(reparsed_choice, recipe.experts)


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@shipped
def test_the_schema_accepts_a_shipped_recipe_short_and_spelled_out(validator, path):
    validator.validate(yaml.safe_load(path.read_text()))
    validator.validate(Recipe.load(path).spelled_out())


@pytest.mark.parametrize(
    "changes",
    [
        {"metod": "linear"},
        {"method": "liner"},
        {"method": "ties", "parameters": {"densty": 0.5}},
        {"method": "ties", "parameters": {"density": [0.5]}},
        {"method": "obm", "parameters": {"densty": 0.5}},
        {"method": None, "pipeline": ["summ"]},
        {"method": None, "pipeline": [{"top": {"densty": 0.5}}, "sum"]},
        {"rules": [{"tensors": "a", "method": "ties", "parameters": {"densty": 0.5}}]},
        {"output": {"path": "out", "shard_sise": 5}},
        {"output": {}},
        {"experts": {}},
        {"seed": -1},
        {"missing": "never"},
    ],
    ids=lambda changes: json.dumps(changes),
)
def test_the_schema_rejects_what_the_recipe_rejects(validator, changes):
    recipe = {key: value for key, value in {**yaml.safe_load(MINIMAL), **changes}.items() if value is not None}
    with pytest.raises(RecipeError):
        Recipe.parse(recipe)
    assert not validator.is_valid(recipe)


def test_the_schema_beside_the_recipes_is_of_this_version():
    assert json.loads((SHIPPED[0].parent / "schema.json").read_text()) == json_schema()


@shipped
def test_a_shipped_recipe_names_the_schema_for_editors(path):
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
