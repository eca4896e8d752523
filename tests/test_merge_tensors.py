"""`merger.merge_tensors`: by public names alone, and checked as recipes and checkpoints are."""

import pytest
import torch

import merger

BASE = {"w": torch.zeros(2, 4), "b": torch.zeros(4)}
EXPERTS = {
    "code": {"w": torch.tensor([[4.0, -1, 0, 0], [0, 0, 0, 0]]), "b": torch.ones(4)},
    "french": {"w": torch.tensor([[2.0, 0, 0, -3], [0, 0, 0, 1]]), "b": torch.ones(4)},
}
WITH_INPUTS = {"w": {"second_moment": torch.ones(2, 1, 4), "reached": torch.ones(2, 1, 1, dtype=torch.bool)}}


def test_a_method_by_its_name_takes_its_parameters():
    merged = merger.merge_tensors("ties", BASE, EXPERTS, density=0.25)
    assert merged["w"].tolist() == [[3, 0, 0, -3], [0, 0, 0, 0]]


def test_a_parameter_that_is_a_word_of_python_ends_in_an_underscore():
    assert merger.merge_tensors("task_arithmetic", BASE, EXPERTS, lambda_=0.5)["b"].tolist() == [1, 1, 1, 1]


def test_a_pipeline_is_written_as_in_a_recipe():
    pipeline = [{"magnitude": {"density": 0.25}}, "sum"]
    assert merger.merge_tensors(pipeline, BASE, EXPERTS)["w"].tolist() == [[6, -1, 0, -3], [0, 0, 0, 0]]


def test_a_pack_is_rebuilt_for_an_expert():
    merged = merger.merge_tensors("emr", BASE, EXPERTS, expert="french")
    assert merged["b"].tolist() == pytest.approx([10 / 12] * 4)  # its own size, of 4 + 3 + 1 + 4 in what all share


@pytest.mark.parametrize(
    ("method", "experts", "parameters", "faults"),
    [
        ("tise", EXPERTS, {}, ["merge_tensors: method: there is no method 'tise'; did you mean 'ties'?"]),
        (
            "ties",
            {"base": EXPERTS["code"]},
            {"density": 2, "desity": 1},
            [
                "merge_tensors: experts.base: an expert's name is letters, digits, _ . -, and not `base`",
                "merge_tensors: parameters.density: is 2, expected at most 1",
                "merge_tensors: parameters.desity: unknown key; did you mean 'density'?",
            ],
        ),
        ("ties", {}, {}, ["merge_tensors: experts: is {}, expected at least 1 of them"]),
        ("slerp", {"a": EXPERTS["code"]}, {}, ["merge_tensors: method: slerp merges exactly 2 experts, not 1"]),
        (
            ["sum", "ties"],
            EXPERTS,
            {},
            [
                "merge_tensors: stage 2: ties is a method; a pipeline is made of stages (`merger methods ties` "
                "shows which)"
            ],
        ),
        (
            "obim",
            EXPERTS,
            {},
            [
                "merge_tensors: method: looks at layer inputs; give layer_inputs={tensor: {'second_moment': ...}}, or "
                "merge folders with their text"
            ],
        ),
    ],
)
def test_a_method_is_checked_as_in_a_recipe(method, experts, parameters, faults):
    with pytest.raises(merger.RecipeError) as refusal:
        merger.merge_tensors(method, BASE, experts, **parameters)
    assert refusal.value.faults == faults


def test_layer_inputs_reach_a_method_that_looks_at_them():
    merged = merger.merge_tensors("obim", BASE, EXPERTS, layer_inputs=WITH_INPUTS, density=0.125)
    assert merged["w"].tolist() == [[4, 0, 0, -3], [0, 0, 0, 0]]


def test_all_tensors_that_do_not_fit_the_base_are_told():
    experts = {"code": {"w": torch.zeros(2, 5)}, "french": {**EXPERTS["french"], "v": torch.zeros(1)}}
    with pytest.raises(merger.CheckpointError) as refusal:
        merger.merge_tensors("ties", BASE, experts)
    assert str(refusal.value).splitlines() == [
        "code: has no b, which the base has",
        "code: w is [2, 5], but [2, 4] in base",
        "french: has v, which the base has not",
    ]


def test_an_expert_that_is_none_is_told_with_the_near_one():
    with pytest.raises(merger.RecipeError, match=r"^expert='frnch': there is no such expert; did you mean 'french'\?$"):
        merger.merge_tensors("emr", BASE, EXPERTS, expert="frnch")
