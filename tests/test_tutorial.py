"""docs/adding-a-method.md: its methods are installed, planned and merged as it says, and keep the laws."""

import json
import os
import re
import subprocess
import sys
import tomllib

import numpy
import pytest
from checkpoints import load
from markdown import ROOT, assert_shown, blocks, commands
from packages import linked_package, run_package

import merger.engine.memory as merger_memory
from merger.demo.demo import prepare
from merger.methods._importing import import_installed
from merger.pipeline import registry

PAGE = "docs/adding-a-method.md"
FILES = {re.search(r"`merger/methods/(\w+)\.py`", block.before)[1]: block.text for block in blocks(PAGE, "python")}
RECIPES = {re.search(r"recipe `(\w+)\.yaml`", block.before)[1]: block.text for block in blocks(PAGE, "yaml")}
CONSOLES = [command for block in blocks(PAGE, "console") for command in commands(block)]
EXPERTS = ("upper", "shift", "double")
DEPTHS = {"embed": 0.0, "layers.0": 0.0, "layers.1": 0.5, "layers.2": 1.0, "model.norm": 1.0}


def install(site):
    """The package that the page lays out, as `pip install` leaves it."""
    (project,) = (tomllib.loads(block.text) for block in blocks(PAGE, "toml"))
    name, version = project["project"]["name"], project["project"]["version"]
    points = project["project"]["entry-points"]["merger.methods"]
    folder, info = site / "my_methods", site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    info.mkdir()
    (folder / "__init__.py").touch()
    for method, text in FILES.items():
        (folder / f"{method}.py").write_text(text)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = ["[merger.methods]", *(f"{point} = {module}" for point, module in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder in which the package of the page is installed, for this process too."""
    folder = install(tmp_path_factory.mktemp("reader") / "site")
    tables = (registry.ENTRIES, registry.SCORES, registry.PACKAGES)
    before = [dict(table) for table in tables]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import_installed()
        yield folder
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for module in [module for module in sys.modules if module.partition(".")[0] == "my_methods"]:
        del sys.modules[module]


@pytest.fixture
def demo(site, tmp_path, monkeypatch):
    """The demo's folder with the recipes of the page; the current folder."""
    prepare(tmp_path / "demo")
    for name, text in RECIPES.items():
        (tmp_path / "demo" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "demo")
    return tmp_path / "demo"


def run_python(site, *arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


# --- the files ------------------------------------------------------------------------------------


def test_the_page_has_a_recipe_and_an_entry_point_for_each_file(site):
    points = (site / "my_methods-0.1.dist-info" / "entry_points.txt").read_text()
    assert FILES.keys() == RECIPES.keys() == set(re.findall(r"= my_methods\.(\w+)", points))
    assert len(FILES) == 4


@pytest.mark.parametrize("check", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_files_pass_ruff(site, check):
    files = sorted(str(path) for path in (site / "my_methods").glob("[a-z]*.py"))
    ran = run_python(site, "-m", "ruff", *check, "--config", str(ROOT / "pyproject.toml"), *files)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_types_of_the_files_are_right(site):
    files = sorted(str(path) for path in (site / "my_methods").glob("[a-z]*.py"))
    ran = run_python(site, "-m", "mypy", "--config-file", "pyproject.toml", *files)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_example_of_the_readme_is_one_of_them():
    (example,) = (block.text for block in blocks("README.md", "python") if "@merger" in block.text)
    assert example in FILES["equal_norms"]


# --- where they are put ---------------------------------------------------------------------------


def test_the_same_files_merge_from_the_folder_of_methods_in_the_same_bytes(demo, merger):
    methods = linked_package(demo.parent / "checkout", "methods")
    for name, text in FILES.items():
        (methods / f"{name}.py").write_text(text)

    ran = run_package(demo.parent / "checkout", "run", "equal_norms.yaml", cwd=demo)
    listing = run_package(demo.parent / "checkout", "methods", "--json", cwd=demo)

    assert (ran.returncode, ran.stderr) == (0, "")
    packages = {method["name"]: method["package"] for method in json.loads(listing.stdout)["merger"]}
    assert [packages[name] for name in FILES] == [None] * 4
    weights = (demo / "merged" / "equal_norms" / "model.safetensors").read_bytes()
    assert merger("run", "equal_norms.yaml", "--set", "output.path=again").code == 0
    assert (demo / "again" / "model.safetensors").read_bytes() == weights


def test_the_line_about_a_broken_module_is_as_shown(site, tmp_path):
    (note,) = (block.text for block in blocks(PAGE) if block.text.startswith("note: "))
    module = re.search(r"No module named '(\w+)'", note)[1]
    broken = install(tmp_path / "site")
    lines = FILES["median"].splitlines()
    lines[int(re.search(r"median\.py:(\d+)", note)[1]) - 1] = f"import {module}"
    (broken / "my_methods" / "median.py").write_text("\n".join(lines) + "\n")

    ran = run_python(broken, "-m", "merger", "methods", "equal_norms", cwd=tmp_path)

    assert ran.returncode == 0
    assert_shown([note], ran.stderr)


# --- what the commands say ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "output"), [pytest.param(words, lines, id=" ".join(words)) for words, lines in CONSOLES if lines]
)
def test_a_command_prints_what_the_page_shows(demo, merger, command, output):
    ran = merger(*command[1:])
    assert_shown(output, ran.out + ran.err)


def test_a_parameter_of_another_type_is_refused_in_the_words_of_the_page(demo, merger):
    ran = merger("plan", "median.yaml", "--set", "parameters.lambda=high")
    assert ran.code == 2
    page = " ".join((ROOT / PAGE).read_text().split())
    assert re.search(r"parameters\.lambda: (.*)", ran.err)[1] in page


# --- what they compute ----------------------------------------------------------------------------


def merged(demo, merger, monkeypatch, name):
    """The change that a recipe of the page makes to each tensor, in slices; and the task vectors, float64."""
    monkeypatch.setattr(merger_memory, "SLICE", 5000)  # ten slices of the largest matrix
    assert merger("run", f"{name}.yaml", "--set", "output.dtype=float32").code == 0
    base = numbers(demo / "models" / "base")
    experts = [numbers(demo / "models" / expert) for expert in EXPERTS]
    deltas = {key: numpy.stack([expert[key] - base[key] for expert in experts]) for key in base}
    output = numbers(demo / "merged" / name)
    return {key: output[key] - base[key] for key in base}, deltas


def numbers(folder):
    return {name: tensor.double().numpy() for name, tensor in load(folder).items()}


def assert_close(changes, expected):
    assert changes.keys() == expected.keys()
    for name, change in changes.items():
        numpy.testing.assert_allclose(change, expected[name], rtol=1e-5, atol=2e-7, err_msg=name)


def depth(name):
    return next(depth for part, depth in DEPTHS.items() if part in name)


def test_the_median_is_that_of_numpy(demo, merger, monkeypatch):
    changes, deltas = merged(demo, merger, monkeypatch, "median")
    expected = {name: numpy.median(delta, 0) * (1 - 0.2 * depth(name)) for name, delta in deltas.items()}
    assert_close(changes, expected)


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two(demo, merger):
    from merger.pipeline.in_memory import merge_stages

    base = {"w": load(demo / "models" / "base")["model.norm.weight"].float()}
    experts = {str(i): {"w": base["w"] + change} for i, change in enumerate((4, -3, 0, 1))}
    change = merge_stages(registry.checked("median", {}), base, experts)["w"] - base["w"]
    numpy.testing.assert_allclose(change, 0.5, atol=1e-6)


def test_equal_norms_are_those_of_whole_tensors(demo, merger, monkeypatch):
    changes, deltas = merged(demo, merger, monkeypatch, "equal_norms")
    expected = {}
    for name, (one, two, three) in deltas.items():
        norms = [numpy.linalg.norm(delta) for delta in (one, two, three)]
        target = sum(norms) / 3
        expected[name] = (one / norms[0] + two / norms[1] + three / norms[2]) * target / 3
    assert_close(changes, expected)


def test_saliency_is_that_of_the_calibrated_inputs(demo, merger, monkeypatch):
    changes, deltas = merged(demo, merger, monkeypatch, "saliency_mean")
    assert merger("calibrate", "saliency_mean.yaml", "--to", "stats").code == 0
    statistics = [
        {name: tensor.double().numpy() for name, tensor in load_statistics(demo / "stats", expert).items()}
        for expert in EXPERTS
    ]
    expected = {}
    for name, delta in deltas.items():
        total = weights = 0
        for moments, change in zip(statistics, delta, strict=True):
            saliency = change**2 * moments.get(f"{name}.second_moment", 1)
            total, weights = total + saliency * change, weights + saliency
        expected[name] = numpy.divide(total, weights, out=numpy.zeros_like(total), where=weights > 0)
    assert sum(f"{name}.second_moment" in statistics[0] for name in deltas) == 22  # 7 of each block, and the head
    assert_close(changes, expected)


def load_statistics(folder, expert):
    from safetensors.torch import load_file

    return load_file(folder / f"{expert}.stats.safetensors")


def test_the_shrunk_mean_is_that_of_lapack(demo, merger, monkeypatch):
    changes, deltas = merged(demo, merger, monkeypatch, "shrunk_mean")
    expected = {}
    for name, delta in deltas.items():
        total = delta[0] + delta[1] / 2 + delta[2]
        mean = total / 3
        if "embed" in name:
            mean = total / 2.5
        elif delta[0].ndim == 2:
            left, values, right = numpy.linalg.svd(mean, full_matrices=False)
            mean = left * numpy.maximum(values - 0.05 * values[0], 0) @ right
        expected[name] = mean
    assert_close(changes, expected)


# --- the laws -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def laws(tmp_path_factory):
    """What pytest says of the laws for the methods of the page, and for `unit_sum`, which the page warns of."""
    site = install(tmp_path_factory.mktemp("laws") / "site")
    unit_sum = FILES["equal_norms"].replace("equal_norms", "unit_sum").replace("norms.mean()", "1.0")
    (site / "my_methods" / "unit_sum.py").write_text(unit_sum)
    with (site / "my_methods-0.1.dist-info" / "entry_points.txt").open("a") as points:
        points.write("unit_sum = my_methods.unit_sum\n")
    choice = " or ".join([*FILES, "unit_sum"])
    ran = run_python(site, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "tests/test_laws.py", "-k", choice)
    return re.findall(r"^(PASSED|FAILED) tests/test_laws\.py::(\w+)\[(\w+)\]", ran.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", FILES)
def test_a_method_keeps_the_laws(laws, name):
    outcomes = {law: outcome for outcome, law, method in laws if method == name}
    assert set(outcomes.values()) == {"PASSED"}
    assert outcomes.keys() >= {
        "test_experts_equal_to_the_base_give_the_base",
        "test_a_lambda_of_zero_gives_the_base",
        "test_the_size_of_slices_does_not_matter",
        "test_scaling_the_task_vectors_scales_what_is_merged",
        "test_tensors_on_a_device_never_meet_those_of_the_cpu",
    }


def test_a_sum_of_task_vectors_of_length_1_fails_the_law_that_the_page_names(laws):
    failed = [law for outcome, law, method in laws if (outcome, method) == ("FAILED", "unit_sum")]
    assert failed == ["test_scaling_the_task_vectors_scales_what_is_merged"]
