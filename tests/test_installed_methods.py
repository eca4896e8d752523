"""Methods of other installed packages, by the entry points that their dist-info names."""

import json
import os
import subprocess
import sys

import pytest
from checkpoints import load, trio

FIRST = '''
"""Keeps the first expert."""
from merger.pipeline.registry import merger


@merger()
def first(deltas, *, lambda_: float = 1.0):
    """The first expert's task vector."""
    return deltas[0] * lambda_
'''


@pytest.fixture
def site(tmp_path):
    """A folder of installed packages; the recipe beside it merges by the method `first`."""
    trio(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "base: base\nexperts: {code: code, math: math}\nmethod: first\noutput: {path: out}\n"
    )
    install(tmp_path / "site", "acme-merging", {"acme": FIRST})
    return tmp_path / "site"


def install(site, name, modules, *, version="1.2", points=None):
    """Installs modules as a package whose entry points are ``points``, by default one for each module of its name."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{point} = {module}" for point, module in (points or {module: module for module in modules}).items()]
    (info / "entry_points.txt").write_text("\n".join(["[merger.methods]", *lines, ""]))
    for module, text in modules.items():
        file = site / f"{module.replace('.', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


def run(site, *arguments, timeout=None):
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "merger", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=site.parent, capture_output=True, text=True, env=environment, timeout=timeout)


def test_a_method_of_an_installed_package_merges(site):
    ran = run(site, "run", "recipe.yaml")

    assert (ran.returncode, ran.stderr) == (0, "")
    merged, expert = load(site.parent / "out"), load(site.parent / "code")
    assert all(bool((merged[name] == expert[name]).all()) for name in expert)


def test_a_method_is_listed_with_the_package_it_comes_from(site):
    assert "\npackage: acme-merging 1.2\n" in run(site, "methods", "first").stdout
    assert json.loads(run(site, "methods", "first", "--json").stdout)["package"] == "acme-merging 1.2"
    assert json.loads(run(site, "methods", "ties", "--json").stdout)["package"] is None


def test_the_manifest_names_the_packages_of_methods_that_were_used(site):
    run(site, "run", "recipe.yaml")
    run(site, "run", "recipe.yaml", "--set", "method=linear", "--set", "output.path=linear")
    versions = [json.loads((site.parent / name / "merger.json").read_text())["versions"] for name in ("out", "linear")]
    assert versions[0] == {**versions[1], "acme-merging": "1.2"}


def test_a_method_inside_another_is_recorded_too(site):
    (site.parent / "recipe.yaml").write_text(
        "base: base\nexperts: {code: code}\noutput: {path: out}\nmethod: knots\nparameters: {inner: first}\n"
    )
    ran = run(site, "lock", "recipe.yaml")
    assert ran.returncode == 0, ran.stderr
    assert json.loads((site.parent / "recipe.lock").read_text())["versions"]["acme-merging"] == "1.2"


def test_a_locked_recipe_refuses_another_version_of_a_package(site):
    run(site, "lock", "recipe.yaml")
    (site / "acme_merging-1.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: acme-merging\nVersion: 1.3\n"
    )

    ran = run(site, "run", "recipe.yaml", "--locked")

    assert ran.returncode == 2
    assert 'versions.acme-merging was "1.2" when it was locked, and is "1.3"' in ran.stderr


def beside(site, text, **more):
    """Installs a second package with one module, and returns the lines that `run` prints about it."""
    install(site, "broken-merging", {"broken.methods": text}, points={"bad": "broken.methods"}, **more)
    ran = run(site, "run", "recipe.yaml")
    assert ran.returncode == 0, ran.stderr
    return ran.stderr.splitlines()


BROKEN = {
    "a package that is not installed": (
        "\nimport nowhere_to_be_found\n",
        ":2: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    ),
    "a syntax error": ("def f(:\n", ":1: SyntaxError: invalid syntax"),
    "a parameter of an unknown type": (
        "from __future__ import annotations\n" + FIRST.replace("float", "Number").replace("first", "second"),
        ": NameError: name 'Number' is not defined",
    ),
    "the name of a method of merger": (
        FIRST.replace("def first", "def ties"),
        ":6: ValueError: there is another ties in merger.methods.ties; give this one another name",
    ),
    "the name of another package's method": (
        FIRST,
        ":6: ValueError: there is another first in acme of acme-merging 1.2; give this one another name",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_names_itself_in_a_line_and_all_other_methods_merge(site, kind):
    text, reason = BROKEN[kind]
    assert beside(site, text) == [
        f"note: broken-merging 1.2, entry point bad: {site}/broken/methods.py{reason}; its methods are left out"
    ]


def test_a_module_that_is_named_as_a_method_of_merger_does_not_replace_it(site):
    install(site, "ties", {"ties": FIRST.replace("def first", "def ties")})
    (line,) = run(site, "plan", "recipe.yaml").stderr.splitlines()
    assert line.startswith(f"note: ties 1.2, entry point ties: {site}/ties.py:")
    assert "there is another ties in merger.methods.ties" in line


def test_an_entry_point_without_a_module_names_itself(site):
    install(site, "empty", {}, points={"bad": "acme:nothing"})
    (line,) = run(site, "plan", "recipe.yaml").stderr.splitlines()
    assert line.startswith("note: empty 1.2, entry point bad: ModuleNotFoundError: No module named 'acme:nothing'")


def test_methods_stand_in_the_modules_of_entry_points_or_below(site):
    install(
        site,
        "pointing",
        {"pointer": "import aside\n", "aside": FIRST.replace("first", "third")},
        points={"stray": "pointer"},
    )
    (line,) = run(site, "plan", "recipe.yaml").stderr.splitlines()
    assert line.startswith("note: pointing 1.2, entry point stray: ")
    assert "ValueError: third stands in aside; methods stand in the module of an entry point" in line


def test_help_imports_no_methods(site):
    code = (
        "import sys; sys.argv = ['merger', '--help']\nfrom merger.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nassert not {'acme', 'merger.methods'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)


ASKS = '''
"""Asks about the model."""
from merger.ops.questions import PrefixSum, Size, Sum
from merger.pipeline.registry import merger


@merger()
def first(deltas):
    """The first expert's task vector over a number of the model."""
    return deltas[0] / (yield QUESTION)
'''
QUESTIONS = {
    "a sum": 'Sum(deltas.double().square().sum(), "global")',
    "a size": 'Size("global")',
    "a prefix sum": 'PrefixSum(lambda: (deltas[0] != 0).sum(), "global")',
}
METHODS = {"as the method": "method: first", "inside another": "method: knots\nparameters: {inner: first}"}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_about_the_model_without_a_scope_is_refused(tmp_path, question, method):
    trio(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        f"base: base\nexperts: {{code: code, math: math}}\n{method}\noutput: {{path: out}}\n"
    )
    install(tmp_path / "site", "acme-merging", {"acme": ASKS.replace("QUESTION", question)})

    ran = run(tmp_path / "site", "run", "recipe.yaml", timeout=60)

    assert ran.returncode == 2
    assert "stage first: ValueError: it asks about the whole model, so it needs a parameter `scope" in ran.stderr
    assert f"{tmp_path}/site/acme.py:10" in ran.stderr
    assert not (tmp_path / "out").exists()
