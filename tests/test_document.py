"""What a recipe's YAML means: names, numbers and switches that YAML's versions read differently."""

from pathlib import Path

import pytest
import yaml

from merger.errors import RecipeError
from merger.evaluation.search.space import spaces
from merger.recipe.document import key_path, parse
from merger.recipe.recipe import Recipe, overridden

RECIPE = """\
base: models/base
experts:
  {name}: models/a
  b: models/b
method: linear
output: {{path: out}}
"""
UNTOUCHED = [
    "no", "No", "on", "yes", "off", "y", "1", "010", "08", "0o10", "0x10", "1:30", "1_000", "1.5", "1.50", "1e3",
    "2026-01-01",
]  # fmt: skip
UNLIKE = ["010", "-010", "0777", "0b10", "1:30", "1:30:00", "1:30.5", "1_0", "1__000", "0x1_0", "1_0.5"]


def values(text, tmp_path):
    return parse(text, "recipe.yaml", tmp_path).value


def load(text, *overrides):
    return Recipe.of(overridden(parse(text, "recipe.yaml", Path()), overrides), overrides)


def fault_of(text, *overrides):
    """The faults of a recipe in a file, or of the arguments beside it."""
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return caught.value.faults


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNTOUCHED)
def test_the_name_of_an_expert_is_the_text_that_was_written(name):
    ok = name.replace(":", "-")  # a colon is in no expert's name
    assert list(load(RECIPE.format(name=ok)).experts) == [ok, "b"]


@pytest.mark.parametrize("name", UNTOUCHED)
def test_every_key_is_the_text_that_was_written(name, tmp_path):
    assert values(f"outer: {{{name}: x}}\n", tmp_path) == {"outer": {name: "x"}}


@pytest.mark.parametrize("name", ["null", "Null", "~", "true", "False"])
def test_a_key_that_is_null_or_a_boolean_must_be_quoted(name):
    (fault,) = fault_of(RECIPE.format(name=name))
    assert fault == f"recipe.yaml:3: experts.{name}: is null or a boolean to YAML; write it in quotes: {name!r}"
    if name != "~":
        assert list(load(RECIPE.format(name=f"'{name}'")).experts) == [name, "b"]


@pytest.mark.parametrize("name", ["int", "str", "one", "auto", "by_expert", "named"])
def test_a_fault_names_an_expert_of_any_name(name):
    text = RECIPE.format(name=name).replace("models/a", "{weight: 2}").replace("linear", "im")
    assert fault_of(f"{text}parameters: {{density: {{{name}: 2, b: 0.1}}}}\n") == [
        f"recipe.yaml:3: experts.{name}.model: is missing",
        f"recipe.yaml:7: parameters.density.{name}: is 2, expected at most 1",
    ]


def test_maps_by_expert_take_names_that_look_like_numbers():
    text = RECIPE.format(name="1") + "parameters: {weight: {1: 2, b: 3}}\n"
    assert load(text).spelled_out()["parameters"]["weight"] == {"1": 2, "b": 3}


@pytest.mark.parametrize(("key", "spelling"), [("1", "'1'"), ("no", '"no"'), ("a", "a")])
def test_two_spellings_of_a_key_are_the_same_key(key, spelling):
    assert fault_of(f"experts: {{\n {key}: x,\n {spelling}: y}}\n") == [
        f"recipe.yaml:3: experts.{key}: stands here a second time"
    ]


def test_an_anchored_value_keeps_its_type_where_it_is_a_key_too(tmp_path):
    assert values("seed: &s 7\nexperts: {*s : x}\n", tmp_path) == {"seed": 7, "experts": {"7": "x"}}


def test_merge_keys_work(tmp_path):
    text = "common: &c {1: x}\nexperts: {<<: *c, b: y}\n"
    assert values(text, tmp_path)["experts"] == {"1": "x", "b": "y"}


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("-3", -3), ("+3", 3), ("1_000", 1000), ("12_000_000", 12_000_000), ("0x1F", 31),
        ("1.5", 1.5), ("1.", 1.0), (".5", 0.5), ("01.5", 1.5), ("1.0e+3", 1000.0), (".inf", float("inf")),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("08", "08"), ("0o10", "0o10"), ("no", "no"), ("On", "On"), ("y", "y"),
        ("2026-01-01", "2026-01-01"), ("1e3", "1e3"), ("1/3", "1/3"), ("=", "="), ("truest", "truest"),
    ],
)  # fmt: skip
def test_a_plain_value_is_what_a_reader_takes_it_for(text, value, tmp_path):
    result = values(f"key: {text}\n", tmp_path)["key"]
    assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize("text", UNLIKE)
def test_a_number_that_yamls_versions_read_differently_is_refused_with_its_line(text):
    (fault,) = fault_of(RECIPE.format(name="a") + f"seed: {text}\n")
    assert fault == (
        f"recipe.yaml:7: seed: YAML 1.1 and 1.2 read {text} differently; write a number in plain digits, or put it "
        "in quotes if it is text"
    )


@pytest.mark.parametrize("text", ["08", "0o10", "2026-01-01", "1e3", "no"])
def test_text_in_place_of_a_number_is_refused_with_its_line(text):
    (fault,) = fault_of(RECIPE.format(name="a") + f"seed: {text}\n")
    assert fault == f"recipe.yaml:7: seed: is {text!r}, expected a whole number"


def test_an_explicit_tag_does_not_let_such_a_number_in():
    assert "read 010 differently" in fault_of(RECIPE.format(name="a") + "seed: !!int '010'\n")[0]


@pytest.mark.parametrize("text", UNLIKE)
def test_such_a_number_in_quotes_is_text(text, tmp_path):
    assert values(f"key: '{text}'\n", tmp_path) == {"key": text}


def test_all_of_them_are_told_at_once():
    text = RECIPE.format(name="~") + "seed: 010\nmissing: [1:30]\n"
    assert [fault.split(" ")[0] for fault in fault_of(text)] == ["recipe.yaml:3:", "recipe.yaml:7:", "recipe.yaml:8:"]


def test_a_list_of_names_that_are_numbers_says_to_quote_them():
    text = RECIPE.format(name="1").replace("linear", "im") + "parameters:\n  order: [1, b]\n"
    assert fault_of(text) == ["recipe.yaml:8: parameters.order 1: is 1, expected text; put it in quotes"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            "rules: [{tensors: norm, use: 1}]",
            "recipe.yaml:7: rule 1 (tensors: norm): use: is 1, expected text; put it in quotes",
        ),
        ("rules: [{tensors: 7, use: b}]", "recipe.yaml:7: rule 1: tensors: is 7, expected text; put it in quotes"),
        ("search: {objective: 1.5}", "recipe.yaml:7: search.objective: is 1.5, expected text; put it in quotes"),
        (
            "calibration: {data: true}",
            "recipe.yaml:7: calibration.data: is True, expected text; put it in quotes",
        ),
    ],
)
def test_a_number_or_a_boolean_in_place_of_text_says_to_quote_it(line, fault):
    assert fault in fault_of(RECIPE.format(name="1") + line + "\n")[0]


def test_names_that_only_yaml_1_1_takes_for_booleans_need_no_quotes():
    text = RECIPE.format(name="no").replace("linear", "im") + "parameters: {order: [no, b]}\n"
    recipe = load(text.replace("path: out", "path: out, tokenizer: no"))
    assert recipe.output.tokenizer == "no"
    assert recipe.spelled_out()["parameters"]["order"] == ["no", "b"]


@pytest.mark.parametrize(("word", "value"), [("no", False), ("off", False), ("yes", True), ("true", True)])
def test_a_switch_takes_either_words(word, value):
    text = RECIPE.format(name="a") + f"parameters: {{normalize: {word}, weight: 0.5}}\n"
    assert load(text).spelled_out()["parameters"]["normalize"] is value


def test_a_switch_of_a_search_takes_true_or_false():
    document = parse(
        RECIPE.format(name="a") + "parameters: {weight: {search: {low: 1, high: 2, log: no}}}\n", "recipe.yaml", None
    )
    with pytest.raises(RecipeError, match=r"recipe.yaml:7: parameters.weight: search: log is 'no', expected true or f"):
        spaces(document, {}, ())


@pytest.mark.parametrize("text", [*UNTOUCHED, *UNLIKE, "null", "true", "~", "", "a: b", "1.0e+3", "=", "<<"])
def test_text_that_yaml_writes_is_read_as_the_same_text(text, tmp_path):
    document = yaml.safe_dump({"key": text, "by_name": {text or "none": 1}})
    assert values(document, tmp_path) == {"key": text, "by_name": {text or "none": 1}}


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("rules.0.method", ("rules", "0", "method")),
        ("experts.010.weight", ("experts", "010", "weight")),
        ('experts."llama-3.1".weight', ("experts", "llama-3.1", "weight")),
        ("experts.'1.5'", ("experts", "1.5")),
    ],
)
def test_a_key_path_is_its_keys_as_written(text, path):
    assert key_path(text) == path


@pytest.mark.parametrize("text", ["", ".", "a..b", 'a."b', "a.", 'a"b"'])
def test_what_is_no_key_path_is_refused(text):
    (fault,) = fault_of(RECIPE.format(name="a"), f"{text}=3")
    assert fault == f"overrides='{text}=3': expected key.path=value, with a key that holds a dot in quotes"


@pytest.mark.parametrize("name", ["no", "1", "010", "v1.5", "1.5"])
def test_set_reaches_an_expert_by_any_name(name):
    recipe = load(RECIPE.format(name=name), f"experts.{name}=models/c", f"parameters.weight={{{name}: 2, b: 3}}")
    assert recipe.experts[name].model == "models/c"
    assert recipe.spelled_out()["parameters"]["weight"] == {name: 2, "b": 3}


def test_set_makes_an_expert_with_a_dot_in_its_name_if_it_is_quoted():
    recipe = load(RECIPE.format(name="a"), 'experts."llama-3.1"=models/c')
    assert list(recipe.experts) == ["a", "b", "llama-3.1"]


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("seed=010", "overrides='seed': YAML 1.1 and 1.2 read 010 differently; write a number in plain digits"),
        ("experts={a: x, a: y}", "overrides='experts': a: stands here a second time"),
        ("output.path=7", "recipe.yaml:6: output.path: is 7, expected text; put it in quotes"),
        ("seed=1:30", "overrides='seed': YAML 1.1 and 1.2 read 1:30 differently"),
    ],
)
def test_set_has_the_same_faults_as_the_file(override, fault):
    assert fault_of(RECIPE.format(name="a"), override)[0].startswith(fault)


def test_set_takes_a_name_that_only_yaml_1_1_takes_for_a_boolean():
    assert load(RECIPE.format(name="no"), "output.tokenizer=no").output.tokenizer == "no"


@pytest.mark.parametrize(
    ("text", "line"),
    [("base: 7\nexperts: {a: a}\n", "1: base"), ("base: b\nexperts: {a: 7}\n", "2: experts.a")],
)
def test_a_number_in_place_of_a_model_says_to_quote_it(text, line):
    assert fault_of(f"{text}method: linear\noutput: {{path: out}}\n") == [
        f"recipe.yaml:{line}: is 7, expected a folder or repository, or {{model: ...}}; put a name in quotes"
    ]
