"""The command `merger inspect`: what people read, what machines read, and when it fails."""

import io
import json

import jsonschema
import pytest
from checkpoints import llama, save
from rich.console import Console

import merger as library
from merger.errors import ConditionError, RecipeError
from merger.inspection import conditions, console

RECIPE = """\
base: base
experts: {code: code, math: math, wiki: wiki}
pipeline: [top: {density: 0.5}, sum]
output: {path: out}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a recipe and its models; the current one. In layer 1 the task vectors of code and math are one."""
    monkeypatch.chdir(tmp_path)
    base = llama(0, hidden=16)
    for seed, name in enumerate(("base", "code", "math", "wiki")):
        tensors = llama(seed, hidden=16)
        if name == "math":
            code = llama(1, hidden=16)
            tensors = {key: code[key] if "layers.1." in key else v for key, v in tensors.items()}
        save(tmp_path / name, base if name == "base" else tensors)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


# --- for machines ---------------------------------------------------------------------------------


def test_json_is_one_object_of_the_documented_form(merger, folder):
    ran = merger("inspect", "recipe.yaml", "--json")
    schema = json.loads(merger("schema", "inspection").out)
    assert (ran.code, ran.err) == (0, "")
    content = json.loads(ran.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(content)
    assert content["format"] == 1
    assert [view["name"] for view in content["views"]] == ["task_vectors", "top", "result"]


def test_every_key_of_the_json_is_described(merger, folder):
    content = json.loads(merger("inspect", "recipe.yaml", "--json").out)
    schema = json.loads(merger("schema", "inspection").out)
    assert content.keys() == schema["properties"].keys()
    assert content["views"][0].keys() == schema["$defs"]["View"]["properties"].keys()
    assert content["views"][0]["whole"].keys() == schema["$defs"]["Facts"]["properties"].keys()
    assert content["views"][-1]["whole"].keys() == schema["$defs"]["Merged"]["properties"].keys()
    assert schema["$defs"]["Facts"]["properties"]["overlap"]["description"].startswith("``overlap[A][B]``: Share of")


def test_a_schema_of_something_else_offers_the_two_there_are(merger):
    ran = merger("schema", "recipes")
    assert (ran.code, ran.err) == (2, "error: there is no schema of 'recipes'; did you mean 'recipe'?\n")


# --- for people -----------------------------------------------------------------------------------


def test_tables_name_every_expert_pair_and_projection(merger, folder):
    ran = merger("inspect", "recipe.yaml")
    assert (ran.code, ran.err) == (0, "")
    for words in ("expert (top)", "A, B (top)", "ends", "layer (top)", "self_attn.q_proj", "code, math"):
        assert words in ran.out
    assert "peak memory" in ran.out.splitlines()[-1]


def test_the_worst_layer_comes_first(merger, folder):
    lines = merger("inspect", "recipe.yaml").out.splitlines()
    row = next(i for i, line in enumerate(lines) if "layer (top)" in line) + 2
    assert lines[row].split()[:2] == ["model.layers.1", "1.000"]


def test_tables_fit_80_columns(folder):
    inspection = library.inspect(library.Recipe.load("recipe.yaml"))
    terminal = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    console.print_inspection(inspection, terminal)
    lines = terminal.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:1] == ["post_attention_layernorm"] for line in lines)  # whole, on a line of its own


def test_only_the_first_dozen_of_a_long_table_is_shown_unless_all_are_asked_for(merger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "code", "math", "wiki")):
        save(tmp_path / name, llama(seed, layers=14))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    short, full = merger("inspect", "recipe.yaml"), merger("inspect", "recipe.yaml", "--all")
    assert "... and 5 more; --all shows them" in short.out
    assert "more;" not in full.out
    assert len(full.out.splitlines()) == len(short.out.splitlines()) + 5 - 1


def test_curves_are_a_table_and_ranks_a_column_that_fit_80_columns(merger, folder, monkeypatch):
    inspection = library.inspect(library.Recipe.load("recipe.yaml"), rank=True, curves=True)
    terminal = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    console.print_inspection(inspection, terminal)
    lines = terminal.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    row = next(i for i, line in enumerate(lines) if line.split() == ["largest", "by", "overlap", "uneven", "rows"])
    assert [line.split()[0] for line in lines[row + 3 :][:3]] == ["0.05", "0.10", "0.20"]
    assert any({"overlap", "rank"} <= set(line.split()) for line in lines)


def test_options_ask_for_curves_and_ranks(merger, folder):
    content = json.loads(merger("inspect", "recipe.yaml", "--json", "--curves", "--rank").out)
    schema = json.loads(merger("schema", "inspection").out)
    jsonschema.Draft202012Validator(schema).validate(content)
    assert content["curves"].keys() == schema["$defs"]["Curves"]["properties"].keys()
    assert content["curves"]["whole"].keys() == schema["$defs"]["Curve"]["properties"].keys()
    assert content["views"][0]["whole"]["effective_rank"].keys() == {"code", "math", "wiki"}


# --- conditions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("overlap > 0.3", (None, None, "overlap", ">", 0.3)),
        ("tensor.cosine<=-1e-2", (None, "tensor", "cosine", "<=", -0.01)),
        ("task_vectors.layer.sign_conflict >= .5", ("task_vectors", "layer", "sign_conflict", ">=", 0.5)),
        ("at_base < 1", ("result", None, "at_base", "<", 1)),
        ("effective_rank < 8", ("task_vectors", None, "effective_rank", "<", 8)),
        ("result.kind.density > 0", ("result", "kind", "density", ">", 0)),
    ],
)
def test_a_condition_is_a_metric_a_sign_and_a_number(text, parts):
    condition = conditions.parse(text)
    assert (condition.view, condition.place, condition.metric, condition.sign, condition.limit) == parts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("overlp > 0.3", "there is no metric 'overlp'; did you mean 'overlap'?"),
        ("layr.overlap > 0.3", "there is no place or view 'layr'; did you mean 'layer'?"),
        ("overlap", "expected a metric, one of > >= < <=, and a number"),
        ("overlap > much", "expected a metric, one of > >= < <=, and a number"),
        ("overlap = 0.3", "expected a metric, one of > >= < <=, and a number"),
        ("layer.tensor.overlap > 1", "expected [task_vectors. or result.][tensor|layer|projection|kind.]METRIC"),
        ("layer.task_vectors.overlap > 1", "expected [task_vectors. or result.][tensor|layer|projection|kind.]METRIC"),
        ("result.overlap > 1", "expected [task_vectors. or result.][tensor|layer|projection|kind.]METRIC"),
        ("task_vectors.blend > 1", "expected [task_vectors. or result.][tensor|layer|projection|kind.]METRIC"),
    ],
)
def test_a_malformed_condition_is_told_with_the_nearest_name(text, words):
    with pytest.raises(RecipeError) as caught:
        conditions.parse(text)
    assert str(caught.value) == f"fail_if='{text}': {words}" + (
        ": 'overlap > 0.3'" if words.endswith("a number") else ""
    )


def test_a_malformed_condition_ends_in_2_before_anything_is_read(merger, tmp_path):
    ran = merger("inspect", tmp_path / "nowhere.yaml", "--fail-if", "overlp > 0.3")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: --fail-if 'overlp > 0.3': there is no metric 'overlp'; did you mean 'overlap'?\n"


def test_a_condition_that_holds_ends_in_1_with_the_worst_offender(merger, folder):
    ran = merger("inspect", "recipe.yaml", "--json", "--fail-if", "overlap > 0.4")
    overlap = json.loads(ran.out)["views"][1]["whole"]["overlap"]
    pair = max(((a, b) for a in overlap for b in overlap[a]), key=lambda pair: overlap[pair[0]][pair[1]])
    assert ran.code == 1
    assert ran.err.startswith(
        f"error: overlap > 0.4: {overlap[pair[0]][pair[1]]:.4g} ({pair[0]}, {pair[1]}) in the whole model (top); "
        "of all tensors 1 (code, math) in model.layers.1."
    )
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize(("text", "code"), [("overlap > 0.9", 0), ("layer.overlap > 0.9", 1), ("density < 0.4", 0)])
def test_a_condition_is_about_the_whole_model_unless_it_names_a_place(merger, folder, text, code):
    assert merger("inspect", "recipe.yaml", "--fail-if", text).code == code


@pytest.mark.parametrize(
    "text", ["distinct < 1000", "tensor.uneven_blocks >= 0", "effective_rank > 1", "layer.effective_rank > 1"]
)
def test_every_fact_can_be_a_condition(merger, folder, text):
    assert merger("inspect", "recipe.yaml", "--fail-if", text).code == 1


def test_less_than_looks_for_the_smallest(folder):
    inspection = library.inspect(library.Recipe.load("recipe.yaml"))
    smallest = min((facts.at_base, name) for name, facts in inspection.view("result").layers.items())
    with pytest.raises(ConditionError) as caught:
        conditions.check([conditions.parse("layer.at_base < 0.9")], inspection)
    assert str(caught.value).startswith(
        f"layer.at_base < 0.9: {smallest[0]:.4g} in {smallest[1]} (result); of all tensors "
    )


def test_equal_limits_hold_only_where_the_sign_says_so(folder):
    inspection = library.inspect(library.Recipe.load("recipe.yaml"))
    conditions.check([conditions.parse("layer.overlap > 1")], inspection)
    with pytest.raises(ConditionError):
        conditions.check([conditions.parse("layer.overlap >= 1")], inspection)


def test_every_condition_that_holds_has_its_line(merger, folder):
    flags = ("--fail-if", "overlap > 0.1", "--fail-if", "overlap > 0.99", "--fail-if", "blend < 0.999")
    ran = merger("inspect", "recipe.yaml", *flags)
    assert ran.code == 1
    assert [line.split(": ")[1] for line in ran.err.splitlines()] == ["overlap > 0.1", "blend < 0.999"]
