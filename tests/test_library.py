"""The library in a notebook: short texts and small tables of its objects, and paths where a recipe is expected."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
from markdown import ROOT, assert_shown, blocks

import merger
from merger.demo import demo
from merger.evaluation import EvaluationSettings
from merger.inspection.report import Inspection

RECIPE = """\
base: base
experts: {code: code, math: math}
method: ties
output: {path: out}
"""
MEASURES = re.compile(r"[\d.]+ (s|MB|GB)\b")
"""Seconds and sizes, which differ between machines."""


def closed_plan(recipe):
    plan = merger.plan(recipe)
    plan.close()
    return plan


def test_the_namespace_shows_the_public_names():
    assert dir(merger) == sorted([*merger.__all__, "__version__"])


# --- texts ------------------------------------------------------------------------------------------


def element(caption, headings, *rows):
    """The HTML table of escaped texts, whose first column has the names of the rows."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{text}</td>" for text in texts)}</tr>' for name, *texts in rows
    )
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def test_a_recipe_in_a_line(folder):
    text = "Recipe(ties of code, math; base base, output out)"
    recipe = merger.Recipe.load("recipe.yaml")
    assert (repr(recipe), str(recipe)) == (text, text)


def test_a_recipe_of_many_experts_and_stages_in_a_line(folder):
    experts = {f"e{i}": "code" for i in range(7)}
    pipeline = [{"top": {"density": 0.5}}, "sum"]
    recipe = merger.Recipe.parse({"base": "base", "experts": experts, "pipeline": pipeline, "output": "out"})
    assert repr(recipe) == "Recipe(top + sum of e0, e1, e2, e3, e4 and 2 more; base base, output out)"


def test_a_plan_in_a_line_and_as_a_table(folder):
    plan = closed_plan("recipe.yaml")
    text = f"Plan(21 tensors, 21 of them merged; reads 4.85 kB, writes 1.62 kB; {plan.recipe!r})"
    assert repr(plan) == text
    assert plan._repr_html_() == element(
        text,
        ("kind", "tensors", "merged", "bytes"),
        ("head", "1", "1", "128 B"),
        ("embedding", "1", "1", "128 B"),
        ("vector", "5", "5", "80 B"),
        ("linear", "14", "14", "1.28 kB"),
    )


def test_an_inspection_in_a_line_and_as_a_table(folder):
    inspection = merger.inspect("recipe.yaml")
    text = "Inspection(of a recipe: code, math against base; views: task_vectors, top, sign_elect, result)"
    assert repr(inspection) == text
    assert inspection._repr_html_() == element(
        text,
        ("expert", "norm", "relative_size", "density"),
        ("code", "30.176", "1.531", "1.000"),
        ("math", "28.400", "1.441", "1.000"),
    )


def test_an_inspection_without_views_is_a_table_of_names():
    inspection = Inspection(1, "merge", "<base>", ["code"], [], [], {}, [])
    assert repr(inspection) == "Inspection(of a merge: code against <base>; views: none)"
    caption = "Inspection(of a merge: code against &lt;base&gt;; views: none)"
    assert inspection._repr_html_() == element(caption, ("expert",), ("code",))


def test_a_result_in_a_line_and_as_a_table(folder):
    result = replace(merger.merge("recipe.yaml"), notes=["a < b"])
    assert MEASURES.sub("#", repr(result)) == (
        f"Result({folder}/out: 21 merged tensors; read 14.5 kB, wrote 1.62 kB in # on cpu, peak memory #)"
    )
    assert MEASURES.sub("#", result._repr_html_()) == element(
        "Result of a merge",
        ("", ""),
        ("output", f"{folder}/out"),
        ("tensors merged", "21"),
        ("read", "14.5 kB"),
        ("written", "1.62 kB"),
        ("time", "# on cpu"),
        ("peak memory", "#"),
        ("note", "a &lt; b"),
    )


# --- paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["recipe.yaml", Path("recipe.yaml")], ids=["str", "Path"])
def test_a_recipe_may_be_named_by_its_path(folder, path):
    assert closed_plan(path).recipe.method == "ties"
    assert merger.inspect(path).experts == ["code", "math"]
    merger.lock(path, "recipe.lock")
    assert merger.check_lock(path, "recipe.lock") == []
    assert not merger.is_done(path, "recipe.lock")
    assert merger.merge(path).tensors["merged"] == 21
    assert merger.is_done(path, "recipe.lock")
    assert merger.inspect_merge("out").subject == "merge"


def test_what_refuses_a_recipe_reads_it_by_its_path_first(folder):
    with pytest.raises(merger.RecipeError, match="there is nothing to calibrate"):
        merger.calibrate("recipe.yaml")
    with pytest.raises(merger.RecipeError, match="there is nothing to judge by"):
        merger.evaluate({"merge": "recipe.yaml"}, settings=EvaluationSettings())
    with pytest.raises(merger.RecipeError, match=r"recipe\.yaml: leaves nothing open"):
        merger.search("recipe.yaml")


def test_a_path_of_no_recipe_is_told_with_the_near_one(folder):
    with pytest.raises(merger.RecipeError) as refusal:
        merger.plan("recip.yaml")
    assert str(refusal.value) == "recip.yaml: there is no such file; did you mean recipe.yaml?"


# --- docs/python.md -----------------------------------------------------------------------------------


def test_the_code_of_the_page_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    demo.prepare(tmp_path / "demo")
    monkeypatch.chdir(tmp_path / "demo")
    namespace = {}
    for block in blocks("docs/python.md", "python"):
        exec(compile(block.text, "docs/python.md", "exec"), namespace)
    output = MEASURES.sub("#", capsys.readouterr().out).replace(str(tmp_path), "/home/you")
    for block in blocks("docs/python.md", "text"):
        assert_shown(MEASURES.sub("#", block.text).splitlines(), output)


def test_the_page_names_every_public_function():
    page = (ROOT / "docs" / "python.md").read_text()
    table = "".join(re.findall(r"^\| `.*$", page.partition("## All functions")[2], re.MULTILINE))
    functions = {name for name in merger.__all__ if inspect.isfunction(getattr(merger, name))}
    assert set(re.findall(r"`?(\w+)\(", table)) == functions
