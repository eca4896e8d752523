"""The demo: its tasks, its folder, its figures, and what it shows on the terminal and as a page."""

from __future__ import annotations

import html.parser
import io
import json
import math
import random
from pathlib import Path

import pytest
from rich.console import Console

from merger.demo import demo, report
from merger.demo.folder import recipe_text
from merger.demo.scores import Score, Share
from merger.demo.tasks import TASKS, double, examples, shift, split_of, upper
from merger.errors import RecipeError
from merger.options import RunOptions
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


def test_every_recipe_of_the_demo_merges_to_a_folder_of_its_own(tmp_path):
    folder = demo.prepare(tmp_path / "demo").parent
    recipes = {path.name: Recipe.load(path) for path in folder.glob("*.yaml")}
    assert {name: recipe.method for name, recipe in recipes.items()} == {
        "recipe.yaml": "obim",
        "featcal.yaml": "featcal",
    }
    assert {str(recipe.output.path) for recipe in recipes.values()} == {"merged/obim", "merged/featcal"}


@pytest.mark.parametrize("method", demo.METHODS)
def test_every_merge_of_the_demo_is_a_valid_recipe(method, tmp_path):
    assert Recipe.parse(recipe_text(method, demo.METHODS[method], "out"), tmp_path).method == method


def test_the_demo_refuses_a_folder_with_other_things_in_it_even_by_force(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose")
    with pytest.raises(RecipeError, match="holds something else"):
        demo.prepare(tmp_path, force=True)
    assert (tmp_path / "thesis.txt").read_text() == "do not lose"


# --- the figures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    return demo.demo(tmp_path_factory.mktemp("figures") / "demo", RunOptions(device="cpu"))


def test_the_base_cannot_do_the_tasks_and_each_expert_can_do_its_own(demonstration):
    for task in TASKS:
        assert demonstration.score("base").tasks[task].value < 0.2
        assert demonstration.score(task).tasks[task].value > 0.95
        assert all(share.value < 0.2 for name, share in demonstration.score(task).tasks.items() if name != task)


EXPECTED = {
    "base": 0.03,
    "linear": 0.82,
    "ties": 0.80,
    "wudi_svc": 0.65,
    "obim": 0.82,
    "regmean": 0.93,
    "featcal": 0.95,
}
"""The share of right answers over all tasks, as in docs/getting-started.md."""


@pytest.mark.parametrize("model", EXPECTED)
def test_the_shares_are_those_that_the_docs_show(demonstration, model):
    assert demonstration.score(model).total.value == pytest.approx(EXPECTED[model], abs=0.03)


def test_a_regression_is_ahead_of_the_average_for_certain(demonstration):
    average, best = demonstration.score("linear").total, demonstration.best
    assert best.model == "featcal"
    assert best.total.low > average.high
    assert min(share.value for share in best.tasks.values()) > 0.5


def test_an_interval_is_wilsons():
    share, z = Share.of(7, 50), 1.96
    for end in (share.low, share.high):  # where the score test is at its limit
        assert abs(0.14 - end) == pytest.approx(z * math.sqrt(end * (1 - end) / 50))
    assert (Share.of(0, 100).low, Share.of(100, 100).high) == pytest.approx((0, 1))
    assert Share.of(100, 100).low == pytest.approx(100 / (100 + z**2))


# --- what is shown ----------------------------------------------------------------------------------


def score_of(model, kind, right):
    replies = {task: f"{model} <{task}>" for task in TASKS}
    return Score(model, kind, dict.fromkeys(TASKS, right), 100, replies)


def few_scores(obim):
    merges = {"linear": 60, "obim": obim, "wudi_svc": 30}
    scores = [score_of("base", "base", 1), *(score_of(name, "merge", right) for name, right in merges.items())]
    return demo.Demonstration(tuple(scores), tuple(examples(task, "heldout", 1)[0] for task in TASKS))


@pytest.mark.parametrize(("obim", "relation"), [(80, "ahead of"), (62, "neither ahead of nor behind"), (40, "behind")])
def test_merges_are_said_to_be_where_their_intervals_put_them(obim, relation):
    expected = f"On models this tiny OBIM is {relation} the average, wudi_svc behind it."
    assert few_scores(obim).findings()[1] == expected


def test_the_terminal_shows_table_samples_and_findings_within_80_columns(demonstration):
    text = io.StringIO()
    report.print_report(demonstration, Console(file=text, width=80))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert lines[0] == "right answers to 300 held-out prompts, 100 of each task"
    assert max(map(len, lines[: lines.index(demonstration.findings()[0])])) <= 80
    for sample in demonstration.samples:
        words = [*sample.prompt.split(), sample.answer, sample.base, sample.average, sample.best]
        assert words in [line.split() for line in lines]
    base, rows = demonstration.score("base").total, [line.split() for line in lines]
    interval = [f"[{100 * base.low:.0f},", f"{100 * base.high:.0f}]"]
    assert ["base", *interval] in [[row[0], *row[-2:]] for row in rows if row]


class Page(html.parser.HTMLParser):
    """The texts of a page by the element that they stand in; checks that elements are closed in their order."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.stack, self.texts = [], {}
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack:
            self.texts.setdefault(self.stack[-1], []).append(data)


def test_the_page_is_well_formed_and_has_bars_samples_and_commands():
    shown = few_scores(80)
    page = Page(report.page(shown, ["merger plan 'a & b/featcal.yaml'", "merger run x"]))
    assert page.texts["h1"] == [report.TITLE]
    assert page.texts["li"][:2] == [line.replace(" %", "\u00a0%") for line in shown.findings()]
    assert page.texts["pre"] == ["merger plan 'a & b/featcal.yaml'\nmerger run x"]
    assert {*TASKS, "base", "linear (average)", "obim"} <= set(page.texts["text"])
    for sample in shown.samples:
        assert sample.prompt.strip() in page.texts["th"]
        assert {sample.answer, sample.base, sample.best} <= set(page.texts["td"])


def test_the_command_writes_the_page_and_ends_with_commands_that_can_be_typed(merger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "METHODS", {"linear": {}, "wudi_svc": {}, "obim": {}})
    ran = merger("demo", "my demo", "--quiet")
    *_, named, plan, run = ran.out.splitlines()
    assert named.startswith("my demo/demo.html shows this with a picture.")
    assert [plan, run] == ["  merger plan 'my demo/featcal.yaml'", "  merger run 'my demo/featcal.yaml'"]
    assert Page(Path("my demo/demo.html").read_text()).texts["pre"] == [f"{plan.strip()}\n{run.strip()}"]

    again = merger("demo", "my demo", "--quiet", "--force", "--json")
    rows = json.loads(again.out)
    assert [row["model"] for row in rows] == ["base", *TASKS, "linear", "wudi_svc", "obim"]
    assert rows[1]["accuracy"]["upper"] > 0.95
    assert rows[1]["interval"]["upper"][0] < rows[1]["accuracy"]["upper"]
