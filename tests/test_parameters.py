"""What a recipe may write for a parameter, what it means, and what is refused."""

import json
from fractions import Fraction

import pytest
from drawing import parameters_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from merger.pipeline.parameters import Pinned, Place, order_of, plain, turns
from merger.pipeline.registry import ENTRIES, SCORES, checked, parameter_names, schema, written
from merger.pipeline.stages import bind

EXPERTS = ("a", "b", "c")
HALF = Fraction(1, 2)


def resolved(name, arguments, parameter, **place):
    """The value that the function gets for a tensor at this place."""
    return bind(checked(name, arguments), Place(EXPERTS, **place)).values[parameter]


def refused(name, arguments):
    """The parameters that are refused, and why."""
    with pytest.raises(ValidationError) as caught:
        checked(name, arguments)
    return {str(error["loc"][0]): error["msg"] for error in caught.value.errors()}


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (0.29, Fraction(29, 100)),
        ("0.29", Fraction(29, 100)),
        ("1/3", Fraction(1, 3)),
        (1, Fraction(1)),
        ("-2", Fraction(-2)),
        (1e-3, Fraction(1, 1000)),
    ],
)
def test_a_number_is_the_exact_decimal_or_fraction_that_was_written(text, value):
    assert resolved("scale", {"lambda": text}, "lambda_") == value


@pytest.mark.parametrize("text", [True, None, "many", "1/0", float("nan"), float("inf"), "nan"])
def test_what_is_no_number_is_refused(text):
    assert set(refused("scale", {"lambda": text})) == {"lambda"}


@pytest.mark.parametrize("text", [-0.1, 1.01, "4/3", {"a": 2}, [0.5, 1.5]])
def test_a_share_outside_the_unit_interval_is_refused(text):
    assert set(refused("top", {"density": text})) == {"density"}


@pytest.mark.parametrize("text", [0, 1, "1/3"])
def test_a_share_may_be_none_or_all(text):
    assert resolved("top", {"density": text}, "density") == [Fraction(text)] * 3


def test_one_number_is_every_experts():
    assert resolved("sum", {"weight": 2}, "weight") == [2, 2, 2]


def test_a_map_gives_each_expert_its_own_in_the_order_of_experts():
    assert resolved("sum", {"weight": {"c": 3, "a": 1, "b": "1/2"}}, "weight") == [1, HALF, 3]


@pytest.mark.parametrize(("depth", "value"), [(0, "0.1"), ("1/4", "0.3"), ("1/2", "0.5"), ("3/4", "0.6"), (1, "0.7")])
def test_a_list_is_interpolated_over_the_depth_exactly(depth, value):
    parameters = {"lambda": [0.1, 0.5, 0.7]}
    assert resolved("scale", parameters, "lambda_", depth=Fraction(depth)) == Fraction(value)


def test_an_experts_own_number_may_vary_over_the_depth():
    parameters = {"weight": {"a": [0, 1], "b": 5, "c": [3, 1]}}
    assert resolved("sum", parameters, "weight", depth=HALF) == [HALF, 5, 2]


def test_a_list_of_one_is_refused():
    assert "at least 2" in refused("sum", {"weight": [0.5]})["weight"]


def test_a_map_must_name_every_expert():
    with pytest.raises(ValueError, match="weight: has no value for c"):
        resolved("sum", {"weight": {"a": 1, "b": 1}}, "weight")


def test_a_map_may_name_no_one_else():
    with pytest.raises(ValueError, match="there is no expert 'd'"):
        resolved("sum", {"weight": {"a": 1, "b": 1, "c": 1, "d": 1}}, "weight")


def test_the_weights_of_experts_multiply_those_of_the_merger():
    weights = (Fraction(1), Fraction(2), Fraction(1, 3))
    assert resolved("sum", {"weight": 3}, "weight", weights=weights) == [3, 6, 1]


@pytest.mark.parametrize(
    ("value", "text"), [(Fraction(2), 2), (Fraction("0.29"), 0.29), (Fraction(1, 3), "1/3"), (Fraction(-1, 8), -0.125)]
)
def test_a_number_is_written_back_without_loss(value, text):
    assert plain(value) == text


# --- orders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("listed", ["abc", "abc", "abc", "abc"]),
        ("rotation", ["abc", "bca", "cab", "abc"]),
        (["c", "a", "b"], ["cab", "cab", "cab", "cab"]),
        (Pinned(first="b"), ["bac", "bca", "bac", "bca"]),
        (Pinned(last="a"), ["bca", "cba", "bca", "cba"]),
        (Pinned(first="b", rest="listed"), ["bac", "bac", "bac", "bac"]),
        (Pinned(first="c", last="a"), ["cba", "cba", "cba", "cba"]),
    ],
)
def test_an_order_by_block(order, expected):
    orders = [order_of(order, Place(EXPERTS, block=block)) for block in range(4)]
    assert ["".join(EXPERTS[k] for k in indices) for indices in orders] == expected


def test_an_order_may_count_linear_tensors():
    place = Place(EXPERTS, block=1, linear=2)
    assert order_of(Pinned(unit="linear"), place) == (2, 0, 1)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["a", "b"], "has no value for c"),
        (["a", "b", "d"], "there is no expert 'd'"),
        (["a", "b", "c", "a"], "each expert once"),
        (Pinned(first="d"), "there is no expert 'd'"),
        (Pinned(first="a", last="a"), "both first and last"),
    ],
)
def test_an_order_names_each_expert_once(order, message):
    with pytest.raises(ValueError, match=message):
        order_of(order, Place(EXPERTS))


@pytest.mark.parametrize("order", ["random", {"middle": "a"}, {"first": "a", "rest": "shuffled"}, 3])
def test_another_kind_of_order_is_refused(order):
    assert set(refused("im", {"order": order})) == {"order"}


@pytest.mark.parametrize(
    ("order", "expected"),
    [("rotation", True), (Pinned(first="a"), True), ("listed", False), (["a", "b"], False), (None, False)],
)
def test_which_orders_turn_from_block_to_block(order, expected):
    assert turns(order) is expected


def test_a_pinned_order_that_is_listed_does_not_turn():
    assert not turns(Pinned(first="a", rest="listed"))


def test_no_order_means_that_masks_may_overlap():
    assert resolved("top", {}, "exclusive") is None


# --- what a function takes --------------------------------------------------------------------------


def test_lambda_is_written_without_the_underscore_of_its_python_name():
    assert checked("scale", {"lambda": 0.5}).keywords == {"lambda_": HALF}
    assert set(refused("scale", {"lambda_": 0.5})) == {"lambda_"}


def test_an_unknown_parameter_is_refused():
    assert refused("ties", {"densty": 0.5}) == {"densty": "Extra inputs are not permitted"}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ties", {"merge": "median"}),
        ("bs", {"n": -1}),
        ("bs", {"m": 0}),
        ("bs", {"n": 1.5}),
        ("linear", {"normalize": "perhaps"}),
        ("top", {"score": "beauty"}),
        ("top", {"score": {"obm": {}, "magnitude": {}}}),
        ("top", {"score": {"obm": {"hessian": "third_moment"}}}),
        ("im", {"density": "automatic"}),
    ],
)
def test_a_value_of_another_kind_is_refused(name, arguments):
    assert set(refused(name, arguments)) == set(arguments) or "hessian" in refused(name, arguments)


def test_all_faults_are_told_at_once():
    assert set(refused("ties", {"density": 2, "merge": "median", "lamda": 1})) == {"density", "merge", "lamda"}


def test_an_unknown_score_is_told_with_the_near_one():
    assert "did you mean 'magnitude'?" in refused("top", {"score": "magnitud"})["score"]


def test_a_score_may_have_parameters_of_its_own():
    score = checked("top", {"score": {"obm": {"hessian": "none"}}}).keywords["score"]
    assert score.keywords["hessian"] == "none"


def test_a_scores_name_stands_for_the_top_of_it():
    short = checked("obm", {"density": 0.3, "hessian": "none"})
    assert written(short) == written(checked("top", {"density": 0.3, "score": {"obm": {"hessian": "none"}}}))


def test_a_scores_name_takes_the_parameters_of_both():
    assert parameter_names("obm") == {
        *("hessian", "nonlinear", "embedding"),
        *("density", "scope", "exclusive", "ratio_of", "claim_zeros", "at_least"),
    }


@pytest.mark.parametrize("name", [*ENTRIES, *SCORES])
def test_every_function_says_in_a_line_what_it_does(name):
    entry = ENTRIES.get(name) or SCORES[name]
    assert entry.summary.endswith(".") or ":" in entry.summary


@pytest.mark.parametrize("name", list(ENTRIES))
def test_every_schema_can_be_written_as_json(name):
    properties = schema(ENTRIES[name]).model_json_schema()["properties"]
    assert set(properties) == parameter_names(name)


# --- written back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ENTRIES, *SCORES])
def test_defaults_are_spelled_out(name):
    ((stage, arguments),) = written(checked(name, {})).items()
    assert set(arguments) == parameter_names(stage)


@pytest.mark.parametrize("name", [*ENTRIES, *SCORES])
@given(st.data())
def test_what_is_written_back_is_the_same_stage(name, data):
    stage = checked(name, data.draw(parameters_of(name, EXPERTS)))
    ((stage_name, arguments),) = json.loads(json.dumps(written(stage))).items()
    restored = checked(stage_name, arguments)
    assert restored.func is stage.func
    assert written(restored) == written(stage)
    for parameter, value in stage.keywords.items():
        if parameter not in ("score", "inner", "anchor"):
            assert restored.keywords[parameter] == value
