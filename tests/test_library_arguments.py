"""What a caller of the library gets wrong ends in a MergerError that says what to pass, and in no error from inside."""

from __future__ import annotations

import pytest
import torch

import merger
from merger.errors import CheckpointError, RecipeError
from merger.options import RunOptions

W = torch.zeros(2, 4)
BASE = {"w": W}
CODE, FRENCH = {"w": W + 1}, {"w": W + 2}
EXPERTS = {"code": CODE, "french": FRENCH}
BY_EXPERT = "expected each expert's tensors by its name, as in {'code': code, 'french': french}"
BY_NAME = "expected tensors by name, as model.state_dict() has them"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": [CODE, FRENCH]}, f"experts: {BY_EXPERT}, not list"),
        ({"experts": CODE}, f"experts: {BY_EXPERT}, not the tensors of one"),
        ({"experts": {"code": [W]}}, f"experts['code']: {BY_NAME}, not list"),
        ({"base": [W]}, f"base: {BY_NAME}, not list"),
        ({"base": torch.nn.Linear(2, 2)}, f"base: {BY_NAME}, not Linear"),
        ({"base": {"w": W.numpy()}}, "base: w is ndarray, expected a torch.Tensor"),
        ({"method": None}, "method: expected a method's name, as in 'ties', or a list of stages, not NoneType"),
        ({"method": len}, "method: expected a method's name, as in 'ties', or a list of stages, not "
            "builtin_function_or_method"),
        ({"seed": "x"}, "seed='x': expected a whole number from 0 on"),
        ({"kinds": "head"}, "kinds: expected kinds by tensor, as in {'lm_head.weight': 'head'}, not str"),
        ({"kinds": {"w": "linaer"}}, "kinds: w is 'linaer', which is no kind; did you mean 'linear'?"),
        ({"kinds": {"v": "linear"}}, "kinds: there is no tensor 'v' in base; it has 1"),
        ({"layer_inputs": [1]}, "layer_inputs: expected inputs by tensor, as in {tensor: {'second_moment': values}}, "
            "not list"),
        ({"layer_inputs": {"w": {"second_momen": W}}}, "layer_inputs: w: there is no input 'second_momen'; did you "
            "mean 'second_moment'?"),
        ({"layer_inputs": {"w": {"second_moment": [1]}}}, "layer_inputs: w: second_moment is list, expected a "
            "torch.Tensor"),
    ],
)  # fmt: skip
def test_an_argument_of_another_type_is_told_with_what_to_pass(arguments, message):
    with pytest.raises(RecipeError) as refused:
        merger.merge_tensors(**{"method": "linear", "base": BASE, "experts": EXPERTS, **arguments})
    assert str(refused.value) == f"merge_tensors: {message}"


def test_values_that_are_not_finite_are_told_by_model_and_tensor():
    with pytest.raises(CheckpointError) as refused:
        merger.merge_tensors("linear", {"w": W + torch.inf}, {"code": {"w": W * torch.nan}})
    assert str(refused.value) == "base: w holds NaN or infinity\ncode: w holds NaN or infinity"


CALLS = {
    "merge of a dictionary": (lambda: merger.merge({"base": "b"}),
        "recipe: expected a path, not dict; merger.Recipe.parse makes a recipe of a dictionary"),
    "plan of nothing": (lambda: merger.plan(None), "recipe: expected a path, not NoneType"),
    "a device as options": (lambda: merger.calibrate(merger.Recipe.parse(RECIPE), "cpu"),
        "options: expected merger.RunOptions(device='cpu', ...), not str"),
    "memory as text": (lambda: RunOptions(max_memory="4GB"),
        "max_memory='4GB': expected a number of bytes, as in 4_000_000_000"),
    "progress as a switch": (lambda: RunOptions(progress=True),
        "progress=True: expected a function; leave it out for none"),
    "a recipe of a list": (lambda: merger.Recipe.parse([1]),
        "recipe: expected YAML text, or a dictionary with base, experts, method and output, not list"),
    "one override as text": (lambda: merger.Recipe.load("recipe.yaml", "seed=1"),
        "overrides: expected a list of texts, as in ['parameters.density=0.3'], not str"),
    "verify of nothing": (lambda: merger.verify(None), "directory: expected a path, not NoneType"),
    "inspect of a number": (lambda: merger.inspect(3), "recipe: expected a path, not int"),
    "search of nothing": (lambda: merger.search(None), "path: expected a path, not NoneType"),
    "evaluate of a recipe": (lambda: merger.evaluate("recipe.yaml"),
        "subjects: expected recipes or folders by name, not str"),
}  # fmt: skip
RECIPE = {"base": "b", "experts": ["c"], "method": "linear", "output": "out"}


@pytest.mark.parametrize("call", CALLS)
def test_a_function_says_what_it_takes(call):
    function, message = CALLS[call]
    with pytest.raises(RecipeError) as refused:
        function()
    assert str(refused.value) == message
