"""docs/getting-started.md: its commands, typed in their order, print what the page shows."""

import re
from pathlib import Path

import pytest
import yaml
from markdown import assert_shown, blocks, commands

from merger.demo import demo

PAGE = "docs/getting-started.md"
CONSOLES = [entry for block in blocks(PAGE, "console") for entry in commands(block)]
STEPS = CONSOLES[[words for words, _ in CONSOLES].index(["cd", "demo"]) + 1 :]
MEASURES = re.compile(r"\d+(\.\d+)? (s|MB|GB)\b")
"""Seconds and sizes, which differ between machines."""
MERGES = re.compile(r"^ (recipe|merge|linear|weights) .*", re.MULTILINE)
"""Rows of merges in the table of `merger eval`, in which one answer more may be right on another CPU."""


def stable(text):
    """A text without what differs between machines: its folder, seconds, sizes, and answers of merges."""
    text = text.replace(f"{Path.cwd()}/", "/home/you/demo/")
    return MERGES.sub(r" \1", MEASURES.sub("#", text))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The demo's folder; the current one."""
    demo.prepare(tmp_path / "demo")
    monkeypatch.chdir(tmp_path / "demo")
    return tmp_path / "demo"


def test_the_commands_of_the_page_print_what_it_shows(folder, merger, capsys):
    outputs = {}
    for words, lines in STEPS:
        ran = merger(*words[1:])
        outputs[words[1]] = ran.out
        assert_shown([stable(line) for line in lines], stable(ran.out + ran.err))

    (recipe,) = blocks(PAGE, "yaml")
    assert yaml.safe_load(Path("merge.yaml").read_text()) == yaml.safe_load(recipe.text)
    behind = dict(re.findall(r"^ (recipe|linear|weights) .* \[(-?[\d.]+), [\d.]+\] *$", outputs["eval"], re.MULTILINE))
    assert {merge: float(low) > 0 for merge, low in behind.items()} == {
        "recipe": False,
        "linear": False,
        "weights": True,
    }
    (code,) = blocks(PAGE, "python")
    exec(compile(code.text, PAGE, "exec"), {})
    (answers,) = blocks(PAGE, "text")
    assert capsys.readouterr().out == answers.text


def test_the_page_begins_with_the_table_of_the_demo():
    (table,) = (lines for words, lines in CONSOLES if words == ["merger", "demo"])
    names = [line.split()[0] for line in table[3:]]
    assert names == ["base", *["expert"] * len(demo.demo_tasks.TASKS), *demo.METHODS]
