"""mergekit configurations as recipes: methods, filters and gradients, slices, and what has no equivalent."""

import math
from contextlib import suppress
from fractions import Fraction

import pytest
import torch
import yaml
from checkpoints import load, save, trio
from hypothesis import given, settings
from hypothesis import strategies as st

from merger import Recipe, RecipeError, merge, plan
from merger.recipe.document import parse
from merger.recipe.mergekit import METHODS, import_mergekit


def imported(text, tmp_path="."):
    return import_mergekit(parse(text, "m.yml", tmp_path))


def config(method, options="", models="{a: {weight: 1}, b: {weight: 1}}", base="base_model: base"):
    """A configuration with a list of models and their parameters."""
    listed = "".join(
        f"  - {{model: {name}, parameters: {parameters}}}\n" for name, parameters in yaml.safe_load(models).items()
    )
    return f"merge_method: {method}\nmodels:\n{listed}{base}\n{options}\n"


def stages(recipe):
    """The pipeline of a recipe or of a rule, one stage or several."""
    if "pipeline" in recipe:
        return [stage if isinstance(stage, dict) else {stage: {}} for stage in recipe["pipeline"]]
    return [{recipe["method"]: recipe.get("parameters", {})}]


def faults(text):
    with pytest.raises(RecipeError) as caught:
        imported(text)
    return caught.value.faults


# --- what each method comes to ----------------------------------------------------------------------

ONE, TWO = "{a: {}}", "{a: {}, b: {}}"
ELECT = {"weight": 1, "zero_sign": "positive"}
TRANSLATED = [
    (config("linear", base=""), [{"linear": {"weight": 1, "normalize": True}}]),
    (config("linear", "parameters: {normalize: false}", base=""), [{"linear": {"weight": 1, "normalize": False}}]),
    (config("passthrough", models="{a: {scale: 0.5}}", base=""), [{"linear": {"weight": 0.5, "normalize": False}}]),
    (config("slerp", "parameters: {t: 0.3}", ONE), [{"slerp": {"t": 0.3, "space": "weights"}}]),
    (config("nuslerp"), [{"nuslerp": {"weight": 1, "space": "delta", "scope": "tensor"}}]),
    (config("nuslerp", base=""), [{"nuslerp": {"weight": 1, "space": "weights", "scope": "tensor"}}]),
    (config("multislerp"), [{"multislerp": {"weight": 1, "space": "delta", "normalize": True}}]),
    (
        config("multislerp", "parameters: {normalize_weights: false}", base=""),
        [{"multislerp": {"weight": 1, "space": "weights", "normalize": False}}],
    ),
    (config("karcher", models=TWO, base=""), [{"karcher": {"space": "weights", "max_iter": 10, "tol": 1e-5}}]),
    (config("task_arithmetic"), [{"sum": {"weight": 1}}]),
    (
        config("task_arithmetic", "parameters: {density: 0.5, lambda: 0.7}"),
        [{"sum": {"weight": 1}}, {"scale": {"lambda": 0.7}}],
    ),
    (config("task_arithmetic", "parameters: {normalize: true}"), [{"mean": {"weight": 1}}]),
    (
        config("ties", "parameters: {density: 0.5, int8_mask: true}"),
        [{"top": {"density": 0.5, "at_least": 1}}, {"sign_elect": {**ELECT, "merge": "mean"}}],
    ),
    (
        config("ties", "parameters: {density: 0.5, normalize: false, rescale: true}"),
        [
            {"top": {"density": 0.5, "at_least": 1}},
            {"rescale": {"by": "l1"}},
            {"sign_elect": {**ELECT, "merge": "sum"}},
        ],
    ),
    (config("ties"), [{"sign_elect": {**ELECT, "merge": "mean"}}]),
    (
        config("dare_linear", "parameters: {density: 0.5}"),
        [{"random": {"density": 0.5, "rescale": "none"}}, {"rescale": {"by": "l1"}}, {"sum": {"weight": 1}}],
    ),
    (
        config("dare_ties", "parameters: {density: 0.5, rescale: false}"),
        [{"random": {"density": 0.5, "rescale": "none"}}, {"sign_elect": {**ELECT, "merge": "sum"}}],
    ),
    (
        config("della", "parameters: {density: 0.5, epsilon: 0.1}"),
        [
            {"magprune": {"density": 0.5, "epsilon": 0.2, "rank_norm": "n-1", "rescale": "none"}},
            {"rescale": {"by": "l1"}},
            {"sign_elect": {**ELECT, "merge": "mean"}},
        ],
    ),
    (
        config("breadcrumbs", "parameters: {density: 0.9}"),
        [{"middle": {"density": 0.9, "drop_high": 0.01}}, {"sum": {"weight": 1}}],
    ),
    (
        config("breadcrumbs_ties", "parameters: {density: 0.9, gamma: 0.05}"),
        [{"middle": {"density": 0.9, "drop_high": 0.05}}, {"sign_elect": {**ELECT, "merge": "sum"}}],
    ),
    (config("sce", models=TWO), [{"sce": {"select_topk": 1, "even_below": 1e-6}}]),
    (config("model_stock", models=TWO), [{"model_stock": {"scope": "tensor"}}]),
    (config("nearswap", "parameters: {t: 1e-4}", ONE), [{"nearswap": {"t": 0.0001}}]),
    (config("ram", models=TWO), [{"ram": {"epsilon": 1e-5}}]),
    (config("ramplus_tl", models=TWO), [{"ram": {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}}]),
    (config("arcee_fusion", models=ONE), [{"arcee_fusion": {}}]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), TRANSLATED)
def test_a_method_becomes_the_stages_that_do_the_same(text, expected):
    assert stages(imported(text).recipe) == expected


def test_every_method_is_tried():
    assert {yaml.safe_load(text)["merge_method"] for text, _ in TRANSLATED} | {"della_linear"} == METHODS.keys()


def test_a_parameter_of_each_model_becomes_a_map_by_expert():
    recipe = imported(config("ties", models="{a: {weight: 1, density: 0.3}, b: {weight: 0.5, density: 2}}")).recipe
    assert stages(recipe)[0]["top"]["density"] == {"a": 0.3, "b": 1}
    assert stages(recipe)[1]["sign_elect"]["weight"] == {"a": 1, "b": 0.5}


def test_a_model_that_della_does_not_thin_has_no_window():
    recipe = imported(config("della", models="{a: {weight: 1, density: 0.5}, b: {weight: 1}}")).recipe
    assert stages(recipe)[0]["magprune"]["epsilon"] == {"a": 0.3, "b": 0}


@pytest.mark.parametrize(("row_wise", "scope", "stored"), [("false", "row", "column"), ("true", "column", "row")])
def test_rows_of_gpt2s_conv1d_are_columns_here(row_wise, scope, stored):
    options = f"parameters: {{nuslerp_flatten: false, nuslerp_row_wise: {row_wise}}}"
    recipe = imported(config("nuslerp", options)).recipe
    assert recipe["parameters"]["scope"] == scope
    assert [(rule["kinds"], rule["parameters"]["scope"]) for rule in recipe["rules"]] == [(["conv1d"], stored)]


# --- models -----------------------------------------------------------------------------------------


def test_where_task_vectors_start_is_no_expert():
    recipe = imported(config("task_arithmetic", models="{base: {}, a: {weight: 1}}")).recipe
    assert (recipe["base"], recipe["experts"]) == ("base", {"a": "a"})


def test_without_a_base_the_first_model_is_the_base_and_an_expert():
    recipe = imported(config("linear", base="")).recipe
    assert (recipe["base"], recipe["experts"]) == ("a", {"a": "a", "b": "b"})


def test_a_base_that_is_averaged_with_the_models_is_an_expert_too():
    recipe = imported(config("linear", "parameters: {weight: 0.2}")).recipe
    assert recipe["experts"] == {"a": "a", "b": "b", "base_model": "base"}
    assert recipe["parameters"]["weight"] == {"a": 1, "b": 1, "base_model": 0.2}


@pytest.mark.parametrize("models", ["{a: {}}", "{base: {}, a: {}}", "{a: {}, base: {}}"])
def test_slerp_starts_at_the_base_wherever_it_is_listed(models):
    recipe = imported(config("slerp", "parameters: {t: 0.3}", models)).recipe
    assert list(recipe["experts"].values()) == ["base", "a"]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("org/a@v1", {"a": "org/a@v1"}),
        ("org/a+org/lora", {"lora": {"model": "org/a", "adapter": "org/lora"}}),
        ("org/a@v1+org/lora@v2", {"lora": {"model": "org/a@v1", "adapter": "org/lora@v2"}}),
        (
            "{model: {path: org/a, revision: v1}, lora: {path: org/lora}}",
            {"lora": {"model": "org/a@v1", "adapter": "org/lora"}},
        ),
        ("./models/some thing/", {"some_thing": "./models/some thing/"}),
        (r"E:\models\a", {"a": r"E:\models\a"}),
        ("other/base", {"base_model": "other/base"}),
    ],
)
def test_a_model_is_named_as_the_recipe_names_it(parameters, expected):
    text = f"merge_method: linear\nmodels: [{{model: {parameters}, parameters: {{weight: 1}}}}]\n"
    assert imported(text).recipe["experts"] == expected


def test_models_of_one_name_are_told_apart():
    recipe = imported(config("linear", models="{x/a: {weight: 1}, y/a: {weight: 1}, z/a: {weight: 1}}", base="")).recipe
    assert recipe["experts"] == {"a": "x/a", "a-2": "y/a", "a-3": "z/a"}


# --- what goes out ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {}),
        ("dtype: bfloat16", {"dtype": "bfloat16"}),
        ("dtype: float32\nout_dtype: torch.bfloat16", {"dtype": "bfloat16"}),
        ("tokenizer: {pad_to_multiple_of: 64}", {"pad_rows_to": 64}),
    ],
)
def test_the_output_has_the_dtype_and_the_multiple_of_rows(options, expected):
    assert imported(config("task_arithmetic", options)).recipe["output"] == {"path": "out/merged", **expected}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {}),
        ("tokenizer_source: base", {"tokenizer": "base"}),
        ("tokenizer_source: b", {"tokenizer": "b"}),
        ("tokenizer_source: union", {"tokenizer": "union"}),
        ("tokenizer: {source: b}", {"tokenizer": "b"}),
        ("tokenizer: {}", {"tokenizer": "union"}),
        (
            "tokenizer: {source: union, tokens: {<x>: {source: b, force: true}, <y>: {source: {kind: zero}}}}",
            {"tokenizer": "union", "tokens": {"<x>": {"from": "b"}, "<y>": {"from": "zero"}}},
        ),
        (
            "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: base, token: <x>}, force: true}, <y>: {}}}",
            {"tokenizer": "union", "tokens": {"<x>": {"from": "base"}}},
        ),
    ],
)
def test_the_vocabulary_is_that_of_the_file(options, expected):
    recipe = imported(config("task_arithmetic", options)).recipe
    assert {key: recipe[key] for key in ("tokenizer", "tokens") if key in recipe} == expected


def test_a_row_that_mergekit_takes_only_where_it_is_missing_is_noted():
    text = config("task_arithmetic", "tokenizer: {source: base, tokens: {<x>: {source: b}}}")
    assert imported(text).recipe["tokens"] == {"<x>": {"from": "b"}}
    assert imported(text).notes == (
        "tokenizer.tokens.<x>: without force, mergekit merges the rows of all models that have the token; here its row "
        "is that of b.",
    )


@pytest.mark.parametrize(
    ("tokens", "fault"),
    [
        ("3", "tokens: expected tokens with their sources, as in {<pad>: {source: {kind: zero}}}"),
        ("{<x>: 3}", "tokens.<x>: expected a source, as in {source: model, force: true}"),
        ("{<x>: {source: c}}", "tokens.<x>.source: 'c' is none of the models that are merged"),
        (
            "{<x>: {source: {kind: model_token, model: b, token: <y>}}}",
            "tokens.<x>.source: the row of another token has no equivalent; a token's row is that of the same token",
        ),
    ],
)
def test_a_row_without_an_equivalent_is_refused(tokens, fault):
    assert faults(config("task_arithmetic", f"tokenizer: {{tokens: {tokens}}}")) == [f"m.yml:6: tokenizer.{fault}"]


def test_what_mergekit_does_not_look_at_is_noted():
    text = config("linear", "name: mine\nparameters: {densty: 0.5}", models="{a: {weight: 1, t: 1}}", base="")
    assert imported(text).notes == tuple(
        f"{key}: mergekit does not look at it."
        for key in ("name", "model 1: parameters.t", "parameters.densty")
    )  # fmt: skip


# --- filters and gradients: every tensor's own value ------------------------------------------------

GRADED = """\
merge_method: slerp
base_model: base
models: [{model: code}]
parameters:
  t:
    - {filter: self_attn, value: [0, 1/2, 1]}
    - {filter: mlp, value: 0.25}
    - {filter: mlp.down_proj, value: 0.5}
    - {filter: layernorm, value: [0.75]}
    - {value: [0.1, 0.6]}
""".replace("1/2", "0.5")


def mergekit_t(name, layers=4):
    """What mergekit makes of GRADED: the first filter that fits, and the first value outside the blocks."""
    block = int(name.split(".")[2]) if ".layers." in name else 0
    at = Fraction(block, layers - 1)
    if "self_attn" in name:
        return at
    if "mlp" in name:
        return Fraction(1, 4)
    return Fraction(3, 4) if "layernorm" in name else Fraction(1, 10) + at / 2


def planned(text, folder, **options):
    """The plan of an imported configuration on tiny models, by tensor."""
    trio(folder, **options)
    recipe = Recipe.parse(imported(text).recipe, folder)
    merge_plan = plan(recipe)
    merge_plan.close()
    return {tensor.name: tensor for tensor in merge_plan.tensors}


def test_filters_and_gradients_give_every_tensor_the_value_that_mergekit_gives(tmp_path):
    tensors = planned(GRADED, tmp_path, layers=4)
    assert {name: tensor.stages[0].values["t"] for name, tensor in tensors.items()} == {
        n: mergekit_t(n) for n in tensors
    }


def test_rules_are_as_few_as_can_be():
    rules = imported(GRADED).recipe["rules"]
    assert [rule["tensors"] for rule in rules] == [
        r"^(?!.*\.\d+\.)(?=.*layernorm)", r"^(?!.*\.\d+\.)", "self_attn", "mlp", "layernorm",
    ]  # fmt: skip


def test_without_filters_or_gradients_there_are_no_rules():
    assert "rules" not in imported(config("ties")).recipe


def test_a_name_that_holds_two_texts_has_a_rule_of_its_own_where_it_must():
    models = (
        "{a: {weight: [{filter: q_proj, value: 1}, {value: 2}]}, b: {weight: [{filter: attn, value: 3}, {value: 4}]}}"
    )
    recipe = imported(config("linear", models=models, base="")).recipe
    assert [(rule["tensors"], rule["parameters"]["weight"]) for rule in recipe["rules"]] == [
        ("^(?=.*attn)(?=.*q_proj)", {"a": 1, "b": 3}),
        ("q_proj", {"a": 1, "b": 4}),
        ("attn", {"a": 2, "b": 3}),
    ]


def test_the_nearer_parameter_wins_and_a_filter_that_fits_nothing_leaves_it_to_the_next():
    models = "{a: {weight: [{filter: mlp, value: 3}]}, b: {}}"
    recipe = imported(config("linear", "parameters: {weight: 0.5}", models, base="")).recipe
    assert recipe["parameters"]["weight"] == 0.5
    assert recipe["rules"][0]["parameters"]["weight"] == {"a": 3, "b": 0.5}


def test_a_switch_may_depend_on_the_name():
    options = "parameters: {normalize: [{filter: mlp, value: false}, {value: 1.0}]}"
    recipe = imported(config("linear", options, base="")).recipe
    assert recipe["parameters"]["normalize"] is True
    assert recipe["rules"][0]["parameters"]["normalize"] is False


# --- slices -----------------------------------------------------------------------------------------

SLICED = """\
merge_method: linear
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 3], parameters: {weight: [1, 0]}}
      - {model: code, layer_range: [0, 3], parameters: {weight: [0, 1]}}
  - parameters: {weight: 0.5}
    sources:
      - {model: code, layer_range: [3, 4]}
      - {model: math, layer_range: [3, 4], parameters: {weight: [0.25, 0.75]}}
"""


def test_slices_of_one_whole_model_become_values_by_layer(tmp_path):
    tensors = planned(SLICED, tmp_path, layers=4)
    half, embedding, norm = Fraction(1, 2), "model.embed_tokens.weight", "model.norm.weight"
    weights = {0: [1, 0, 0], 1: [half, half, 0], 2: [0, 1, 0], 3: [0, half, Fraction(3, 4)]}
    for name, tensor in tensors.items():
        expected = (
            weights[int(name.split(".")[2])] if ".layers." in name
            else [1, 0, 0] if name == embedding else [0, half, Fraction(1, 4)]
        )  # fmt: skip
        assert tensor.stages[0].values["weight"] == expected, name
    assert norm in tensors


def test_passthrough_of_slices_takes_each_layer_from_its_model(tmp_path):
    models = trio(tmp_path, layers=4)
    text = """\
merge_method: passthrough
slices:
  - sources: [{model: code, layer_range: [0, 1]}]
  - sources: [{model: math, layer_range: [1, 4]}]
"""
    recipe = imported(text).recipe
    merge(Recipe.parse(recipe, tmp_path))
    for name, values in load(tmp_path / "out/merged").items():
        model = "code" if name == "model.embed_tokens.weight" or ".layers.0." in name else "math"
        assert torch.equal(values, models[model][name]), name


FRANKENMERGE = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources:
      - model: b
        layer_range: [1, 4]
        parameters:
          scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: [0.5, 1]}, {value: 1}]
  - sources: [{model: a, layer_range: [2, 4]}]
"""


def test_passthrough_that_moves_layers_becomes_copies():
    recipe = imported(FRANKENMERGE).recipe
    assert recipe == {
        "base": "a",
        "experts": {"b": "b"},
        "layers": [
            {"model": "base", "range": [0, 3]},
            {"model": "b", "range": [1, 4], "scale": {"o_proj": 0, "down_proj": [0.5, 1]}},
            {"model": "base", "range": [2, 4]},
        ],
        "output": {"path": "out/merged"},
    }


def test_the_factors_of_a_model_come_before_those_of_its_slice():
    text = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: a, layer_range: [0, 2], parameters: {scale: [{filter: mlp, value: 2}]}}]
    parameters: {scale: 3}
  - sources: [{model: a, layer_range: [1, 2]}]
"""
    assert imported(text).recipe["layers"][1]["scale"] == {"mlp": 2, ".": 3}


def test_a_factor_of_the_embedding_has_no_equivalent():
    text = FRANKENMERGE.replace("layer_range: [0, 3]", "layer_range: [0, 3], parameters: {scale: 0.5}")
    assert faults(text) == [
        "m.yml:3: slice 1: source 1: parameters.scale: has no equivalent: it scales embedding and head too; name "
        "layers by a filter, as mlp"
    ]


UNLIKE = """\
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}]
  - sources: [{model: a, layer_range: [1, 4]}, {model: b, layer_range: [1, 4]}]
parameters:
  t:
    - {filter: self_attn, value: [0, 1]}
    - {value: 0.5}
"""


def test_slerp_of_unlike_layers_keeps_its_filters_and_gradients():
    recipe = imported(UNLIKE).recipe
    assert recipe["experts"] == {"a": "a", "b": "b"}
    assert recipe["layers"] == [{"range": {"base": [0, 2], "a": [0, 2], "b": [2, 4]}}, {"range": [1, 4]}]
    assert (recipe["method"], recipe["parameters"]["t"]) == ("slerp", 0.5)
    (rule,) = [rule for rule in recipe["rules"] if rule["tensors"] == "self_attn"]
    assert rule["parameters"]["t"] == [0, 1, 0, 0.5, 1]  # from the first to the last layer of each slice


def test_slices_that_merge_other_models_have_a_method_each():
    text = """\
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    parameters: {t: [0, 0.5]}
  - sources: [{model: a, layer_range: [2, 3]}]
  - sources: [{model: a, layer_range: [3, 4]}, {model: c, layer_range: [2, 3]}]
    parameters: {t: [0.25, 0.75]}
parameters: {t: 0}
"""
    assert imported(text).recipe["layers"] == [
        {
            "range": {"base": [0, 2], "a": [0, 2], "b": [0, 2]},
            "method": "slerp",
            "parameters": {"t": [0, 0.5], "space": "weights"},
        },
        {"model": "base", "range": [2, 3]},
        {
            "range": {"base": [3, 4], "a": [3, 4], "c": [2, 3]},
            "method": "slerp",
            "parameters": {"t": 0.75, "space": "weights"},
        },
    ]


def test_the_only_module_is_the_whole():
    slices = yaml.safe_load(SLICED)
    inner = {"slices": slices.pop("slices"), "parameters": {"weight": 0.1}}
    recipe = imported(yaml.safe_dump({**slices, "modules": {"default": inner}})).recipe
    assert recipe == imported(SLICED).recipe


# --- what has no equivalent -------------------------------------------------------------------------


def test_everything_that_has_no_equivalent_is_told_at_once_with_its_line():
    text = """\
merge_method: breadcrums
base_model: base
models:
  - model: a+b+c
  - model: d
    parameters: 0.5
dtype: int8
chat_template: chatml
tokenizer: {source: union, pad_to_multiple_of: 0}
"""
    assert faults(text) == [
        "m.yml:1: merge_method: 'breadcrums' has no equivalent; did you mean 'breadcrumbs'?",
        "m.yml:4: model 1: model: is 'a+b+c', expected a model or model+adapter",
        "m.yml:6: model 2: parameters: expected parameters, as in {weight: 0.5}",
        "m.yml:7: dtype: 'int8' has no equivalent; choose from bfloat16, float16, float32, float64",
        "m.yml:8: chat_template: has no equivalent: the tokenizer keeps its own; leave it out, and put another beside "
        "the output",
        "m.yml:9: tokenizer.pad_to_multiple_of: is 0, expected a whole number from 1 on",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (config("linear", models="{a: {}}", base=""), "m.yml:3: model 1: weight is missing, which the method needs"),
        (
            config("linear", models="{a: {weight: [{filter: mlp, value: 1}]}}", base=""),
            "m.yml:3: model 1: parameters.weight: says nothing of tensors that none of its filters names",
        ),
        (
            config("linear", models="{a: {weight: much}}", base=""),
            "m.yml:3: model 1: parameters.weight: is much, expected a number, a list of them, or {filter, value} pairs",
        ),
        (config("linear", "parameters: 3", base=""), "m.yml:6: parameters: expected parameters, as in {weight: 0.5}"),
        (
            config("linear", "parameters: {normalize: maybe}", base=""),
            "m.yml:6: parameters.normalize: expected true or false",
        ),
        (config("ties", base=""), "m.yml:1: merge_method: needs a base_model"),
        (
            config("ties", models="{a: {weight: [1, -1]}}"),
            "m.yml:1: merge_method: has no equivalent with a negative weight",
        ),
        (config("ties", models="{base: {}}"), "m.yml:2: models: expected a model other than base_model"),
        (config("multislerp", "parameters: {eps: 0.1}"), "m.yml:1: merge_method: has no equivalent with eps: 0.1"),
        ("merge_method: linear\nmodules: {x: {}, y: {}}", "m.yml:2: modules: has no equivalent with several modules"),
        ("merge_method: linear", "m.yml: expected models or slices, found neither"),
        ("models: [{model: a}]", "m.yml: merge_method: is missing"),
        ("merge_method: linear\nmodels: a", "m.yml:2: models: expected a list of keys and values"),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: a}]\nparameters: {weight: 1}",
            "m.yml:2: model 2: model: stands here a second time",
        ),
        (config("linear", "tokenizer_source: c", base=""), "m.yml:6: tokenizer_source: 'c' is none of the models"),
        (
            "merge_method: linear\nmodels:\n  - model: {model: a, override_architecture: X}",
            "m.yml:3: model 1: model.override_architecture: has no equivalent",
        ),
        ("merge_method: linear\n---\nmodels: []", "m.yml:2: holds several documents"),
        (config("slerp", "parameters: {t: 1.5}", ONE), "m.yml:1: merge_method: parameters.t: is 1.5, expected at most"),
        (
            config("nuslerp", models="{a: {weight: 1}}"),
            "m.yml:1: merge_method: method: nuslerp merges exactly 2 experts",
        ),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_said_is_refused_with_the_place(text, fault):
    assert any(line.startswith(fault) for line in faults(text)), faults(text)


@pytest.mark.parametrize("layer_range", ["all", [3, 3], [4, 2], [-1, 2]])
def test_a_range_of_no_layers_is_refused(layer_range):
    text = f"merge_method: passthrough\nslices:\n  - sources: [{{model: a, layer_range: {layer_range}}}]\n"
    expected = "m.yml:3: slice 1: source 1: layer_range: expected the first layer and the one after the last"
    assert faults(text)[0].startswith(expected)


def test_slices_without_the_base_of_the_merge_have_no_equivalent():
    text = SLICED.replace("merge_method: linear", "merge_method: karcher")
    expected = "m.yml:8: slice 2: sources: has no equivalent: names no layers of base, the base of the merge"
    assert faults(text) == [expected]


JUNK = [
    None, True, -1, 1.5, "x", "", "a+b", [], [1, 2], ["a"], {}, {"a": 1}, {"filter": "mlp", "value": 1},
    [{"value": {}}], math.inf, 10**400, [[1]], {"model": {"path": 3}},
]  # fmt: skip


def places(node, path=()):
    """Every place in a tree of maps and lists."""
    yield path
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in pairs:
        yield from places(child, (*path, key))


def changed(node, path, value):
    """The tree with another value at a place."""
    if not path:
        return value
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    children = {key: changed(child, path[1:], value) if key == path[0] else child for key, child in pairs}
    return children if isinstance(node, dict) else list(children.values())


@given(st.sampled_from([text for text, _ in TRANSLATED] + [GRADED, SLICED]), st.data())
@settings(max_examples=60)
def test_whatever_a_configuration_says_is_imported_or_refused_in_words(text, data):
    tree = yaml.safe_load(text)
    path = data.draw(st.sampled_from([path for path in places(tree) if path]))
    with suppress(RecipeError):
        imported(yaml.safe_dump(changed(tree, path, data.draw(st.sampled_from(JUNK)))))


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with three models and a configuration; the current one."""
    monkeypatch.chdir(tmp_path)
    trio(tmp_path)
    (tmp_path / "m.yml").write_text(GRADED)
    return tmp_path


def test_the_command_prints_a_recipe_and_remarks_beside_it(merger, folder):
    (folder / "m.yml").write_text(GRADED + "name: mine\n")
    ran = merger("import", "m.yml")
    assert ran.code == 0
    assert ran.err == "note: name: mergekit does not look at it.\n"
    assert ran.out.startswith("# From m.yml, by merger import.\n# name: mergekit does not look at it.\nbase: base\n")


def test_what_the_command_writes_runs(merger, folder):
    assert merger("import", "m.yml", "-o", "recipe.yaml").code == 0
    assert merger("run", "recipe.yaml", "--quiet").code == 0
    assert (folder / "out/merged/model.safetensors").is_file()


def test_paths_are_those_seen_from_the_recipe(merger, folder):
    (folder / "recipes").mkdir()
    merger("import", "m.yml", "-o", "recipes/r.yaml")
    recipe = Recipe.load(folder / "recipes/r.yaml")
    assert (recipe.base.model, recipe.experts["code"].model) == ("../base", "../code")


def test_a_file_that_is_there_is_not_replaced_unless_told_to(merger, folder):
    (folder / "r.yaml").write_text("mine")
    ran = merger("import", "m.yml", "-o", "r.yaml")
    assert (ran.code, ran.err) == (2, "error: --output r.yaml: is there already; --force replaces it\n")
    assert (folder / "r.yaml").read_text() == "mine"
    assert merger("import", "m.yml", "-o", "r.yaml", "--force").code == 0


def test_a_refused_configuration_ends_in_2_and_writes_nothing(merger, folder):
    (folder / "m.yml").write_text("merge_method: cabs\nmodels: [{model: code}]\n")
    ran = merger("import", "m.yml", "-o", "r.yaml")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: m.yml:1: merge_method: 'cabs' has no equivalent; choose from ")
    assert not (folder / "r.yaml").exists()


def test_slices_that_leave_out_layers_become_an_entry_of_layers_where_the_model_is_at_hand(merger, folder):
    save(folder / "base", load(folder / "base"), {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3})
    text = "merge_method: passthrough\nslices:\n  - sources: [{model: base, layer_range: [0, 2]}]\n"
    (folder / "m.yml").write_text(text)
    ran = merger("import", "m.yml")
    assert yaml.safe_load(ran.out)["layers"] == [{"model": "base", "range": [0, 2]}]


def test_misspelt_keys_come_with_all_other_faults(merger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.yml").write_text("""\
merge_method: tiess
base_modle: base
models:
  - model: a
    paramaters: {weight: 0.5}
  - model: b
    parameters: {wieght: 0.5, densty: 0.5}
parameters: {normalise: true}
tokenizer:
  sorce: union
  tokens: {<pad>: {source: a, forse: true}}
dtype: flaot16
""")
    ran = merger("import", "m.yml")
    assert (ran.code, ran.err.splitlines()) == (
        2,
        [
            "error: m.yml:1: merge_method: 'tiess' has no equivalent; did you mean 'ties'?",
            "error: m.yml:2: base_modle: mergekit does not look at it; did you mean 'base_model'?",
            "error: m.yml:5: model 1: paramaters: mergekit does not look at it; did you mean 'parameters'?",
            "error: m.yml:7: model 2: parameters.wieght: mergekit does not look at it; did you mean 'weight'?",
            "error: m.yml:7: model 2: parameters.densty: mergekit does not look at it; did you mean 'density'?",
            "error: m.yml:8: parameters.normalise: mergekit does not look at it; did you mean 'normalize'?",
            "error: m.yml:10: tokenizer.sorce: mergekit does not look at it; did you mean 'source'?",
            "error: m.yml:11: tokenizer.tokens.<pad>.forse: mergekit does not look at it; did you mean 'force'?",
            "error: m.yml:12: dtype: 'flaot16' has no equivalent; did you mean 'float16'?",
        ],
    )


def test_a_misspelt_key_alone_is_a_note_since_mergekit_ignores_it(merger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.yml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1, wieght: 2}}]\n")
    ran = merger("import", "m.yml")
    note = "note: model 1: parameters.wieght: mergekit does not look at it; did you mean 'weight'?\n"
    assert (ran.code, ran.err) == (0, note)
