"""The demo's tasks and its front door; the whole demo is run by scripts/demo.sh."""

from __future__ import annotations

import random

import pytest

from merger.demo import demo
from merger.demo.tasks import TASKS, double, examples, shift, split_of, upper
from merger.errors import RecipeError
from merger.recipe.recipe import Recipe


def test_each_task_answers_as_its_docstring_says():
    prompt, answer = shift(random.Random(0))
    word = prompt.split()[1]
    assert [chr((ord(letter) - 96) % 26 + 97) for letter in word] == list(answer)
    assert upper(random.Random(0))[1] == word.upper()
    assert double(random.Random(0))[1] == "".join(2 * letter for letter in word)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_prompts_are_never_trained_on(task):
    trained = {prompt for prompt, _ in examples(task, "train", 2000)}
    held_out = {prompt for prompt, _ in examples(task, "heldout", 200)}
    assert not trained & held_out
    assert {split_of(prompt) for prompt in held_out} == {"heldout"}


def test_examples_are_the_same_on_every_run():
    assert examples("shift", "heldout", 3) == examples("shift", "heldout", 3)


def test_the_demo_writes_a_recipe_that_plans(tmp_path):
    recipe = Recipe.load(demo.prepare(tmp_path / "demo"))
    assert list(recipe.experts) == list(TASKS)


@pytest.mark.parametrize("method", demo.METHODS)
def test_every_merge_of_the_demo_is_a_valid_recipe(method, tmp_path):
    assert Recipe.parse(demo._recipe(method, "out"), tmp_path).method == method


def test_the_demo_refuses_a_folder_with_other_things_in_it_even_by_force(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose")
    with pytest.raises(RecipeError, match="holds something else"):
        demo.prepare(tmp_path, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "do not lose"
