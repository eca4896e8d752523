"""Commands on a terminal of 80 columns: no line is wider, and no word, number or interval is broken."""

import re

import pytest
import yaml
from tasks import demo_folder, text_of  # noqa: F401 a fixture

FIGURE = re.compile(r"\[-?[\d.]+, -?[\d.]+\]|\d[\d.]* (?:%|MB|kB|GB|s)(?!\w)|\S+")
"""An interval, a number with its unit, or a word."""


@pytest.fixture
def shown(merger, monkeypatch):
    """The lines that a command shows on a terminal of some columns, or in a file of 200."""

    def show(*arguments, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        ran = merger(*arguments)
        assert ran.code == 0, ran.err
        return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", ran.out).splitlines()]

    return show


@pytest.fixture
def recipe(demo_folder, tmp_path, monkeypatch):  # noqa: F811
    """A recipe of the demo's models in the current folder."""
    monkeypatch.chdir(tmp_path)
    content = text_of(demo_folder, method="ties", parameters={"density": 0.3})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def figures(lines):
    """The words and figures of lines, but for rules and bars, and names that are broken behind dots."""
    return {figure for line in lines for figure in FIGURE.findall(line) if not re.fullmatch("[─█▏▎▍▌▋▊▉]+", figure)}


COMMANDS = {
    "plan": ("plan", "recipe.yaml"),
    "eval": ("eval", "recipe.yaml", "-q"),
    "inspect": ("inspect", "recipe.yaml", "-q", "--curves"),
    "methods": ("methods",),
    "method": ("methods", "obim"),
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_no_line_is_wider_than_80_columns(shown, recipe, arguments):
    lines = shown(*arguments)
    assert max(map(len, lines)) <= 80, [line for line in lines if len(line) > 80]


@pytest.mark.parametrize("name", ["plan", "eval", "methods", "method"])
def test_every_word_and_figure_of_a_wide_terminal_is_whole_in_a_narrow_one(shown, recipe, name):
    wide = figures(shown(*COMMANDS[name], columns=400))
    narrow = shown(*COMMANDS[name])
    text = "\n".join(narrow).replace("model.layers.*\n  ", "model.layers.*.")
    names = {f"model.layers.*.{word}" for word in figures(narrow)}  # a plan's names are below that of their block
    missing = {figure for figure in wide - figures(text.splitlines()) - names if not re.match(r"[\d.]+ [sG]", figure)}
    assert missing == set()


def test_a_narrow_plan_has_the_names_of_a_block_below_it(shown, recipe):
    lines = shown("plan", "recipe.yaml")
    block = lines.index(" model.layers.*")
    assert lines[block + 1].split() == ["input_layernorm.weight", "3", "128", "BF16", "vector", "ties"]
    assert lines[block - 1].split() == ["model.embed_tokens.weight", "1", "58x128", "BF16", "tied", "ties"]
    assert "model.layers.*.mlp.down_proj.weight" in " ".join(shown("plan", "recipe.yaml", columns=120))


def test_a_narrow_table_of_an_evaluation_has_measures_then_shares_for_each_model(shown, recipe):
    lines = shown("eval", "recipe.yaml", "-q")
    rows = [line.split() for line in lines if line.startswith(" recipe ")]
    assert [len(row) for row in rows] == [1 + 3 * 3 + 1, 1 + 3 + 3]  # shares with percent and gain, mean; two intervals
    assert [line.split() for line in lines if line.lstrip().startswith("model")] == [
        ["model", "accuracy", "accuracy", "accuracy", "mean"],
        ["model", "kept", "the", "best"],
    ]


def test_the_result_of_a_merge_and_errors_break_between_words(shown, recipe, merger):
    lines = shown("run", "recipe.yaml", "-q")
    assert all(len(line) <= 80 or " " not in line for line in lines)
    assert re.search(r"\d MB", " ".join(lines))
    ran = merger("plan", "recipe.yaml", "--set", "metod=ties", "--set", "parametrs.density=0.1", "--set", "rulez=[]")
    assert ran.code == 2
    assert max(map(len, ran.err.splitlines())) <= 80
    assert {"'method'?", "'parameters'?"} <= set(ran.err.split())
