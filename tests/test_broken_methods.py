"""A file among the methods that cannot be used: it names itself in a line, and all other methods are there."""

import pytest
from checkpoints import trio
from packages import linked_package, run_package

FINE = "from merger.pipeline.registry import merger\n@merger()\n"
BROKEN = {
    "a syntax error": ("def f(:\n", ":1: SyntaxError: invalid syntax;"),
    "a name that is not defined": (f"{FINE}def bad(deltas: Tensor):\n    pass\n", ": NameError: name 'Tensor'"),
    "a name that is only in a parameter's type": (
        f"from __future__ import annotations\n{FINE}def bad(deltas, *, x: Number = 1):\n    pass\n",
        ": NameError: name 'Number'",
    ),
    "a parameter without a type": (
        f"{FINE}def bad(deltas, *, x=1):\n    pass\n",
        ": TypeError: x of bad has no type, such as float;",
    ),
    "a package that is not installed": ("import nowhere_to_be_found\n", ":1: ModuleNotFoundError: No module named"),
    "the name of another method": (
        f"{FINE}def arcee_fusion(deltas):\n    pass\n",
        ":2: ValueError: there is another arcee_fusion in merger.methods.arcee_fusion; give this one another name;",
    ),
    "bytes that are no text": ("\x00\x01", ": SyntaxError: source code string cannot contain null bytes;"),
    "an exit": ("raise SystemExit(3)\n", ":1: SystemExit: 3;"),
}


@pytest.fixture
def package(tmp_path):
    """A copy of the package, whose methods may be spoilt; the recipe in the folder merges by ties."""
    linked_package(tmp_path / "site", "methods")
    trio(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "base: base\nexperts: {code: code, math: math}\nmethod: ties\noutput: {path: out}\n"
    )
    return tmp_path / "site"


def run(package, *arguments):
    return run_package(package, *arguments, cwd=package.parent)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_names_itself_and_the_other_methods_merge(package, kind):
    text, reason = BROKEN[kind]
    (package / "merger" / "methods" / "bad.py").write_text(text)

    ran = run(package, "run", "recipe.yaml")

    assert ran.returncode == 0, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"note: {package}/merger/methods/bad.py:")
    assert reason in line
    assert line.endswith("; the methods of bad.py are left out")


def test_a_recipe_that_asks_for_a_broken_method_is_refused_beside_the_reason(package):
    (package / "merger" / "methods" / "ties.py").unlink()
    (package / "merger" / "methods" / "ties.py").write_text("import nowhere_to_be_found\n")
    ran = run(package, "plan", "recipe.yaml")
    assert ran.returncode == 2
    first, *_, last = ran.stderr.splitlines()
    assert "methods/ties.py:1: ModuleNotFoundError: No module named 'nowhere_to_be_found'" in first
    assert last.startswith("error: recipe.yaml:3: method: there is no method 'ties'; did you mean ")


def test_a_method_whose_name_is_another_file_is_left_out(package):
    (package / "merger" / "methods" / "a_ties.py").write_text(f"{FINE}def ties(deltas):\n    pass\n")
    ran = run(package, "run", "recipe.yaml")
    assert ran.returncode == 0
    assert ran.stderr == (
        f"note: {package}/merger/methods/a_ties.py: its ties is left out, "
        "for merger.methods.ties is the file of that name\n"
    )


def test_a_file_that_needs_a_broken_one_is_left_out_as_well(package):
    (package / "merger" / "methods" / "sign_elect.py").unlink()
    (package / "merger" / "methods" / "sign_elect.py").write_text("x = y\n")
    ran = run(package, "methods", "--json")
    assert ran.returncode == 0
    assert "sign_elect.py:1: NameError: name 'y' is not defined; the methods of ties.py are left out" in ran.stderr
    assert '"linear"' in ran.stdout
    assert '"ties"' not in ran.stdout


def test_a_parameter_without_a_default_is_listed_and_asked_for(package):
    (package / "merger" / "methods" / "good.py").write_text(f"{FINE}def good(deltas, *, x: float):\n    pass\n")
    listed = run(package, "methods", "good")
    planned = run(package, "plan", "recipe.yaml", "--set", "method=good")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert listed.stdout.split()[-4:] == ["x", "(none)", "a", "number"]
    assert (planned.returncode, planned.stderr) == (2, "error: recipe.yaml: parameters.x: is missing\n")
