"""Searching: spaces, strategies, the record, and a search that is killed and goes on."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml
from tasks import TASKS, demo_folder, file_of, text_of  # noqa: F401 a fixture

from merger.errors import RecipeError
from merger.evaluation.model_host import ModelHost
from merger.evaluation.search import search, strategies
from merger.evaluation.search.space import example, spaces
from merger.evaluation.search.strategies import STRATEGIES
from merger.options import RunOptions
from merger.pipeline.registry import PACKAGES, Package
from merger.recipe.document import parse, read
from merger.recipe.json_schema import json_schema
from merger.recipe.recipe import Recipe, search_of

SHIPPED = sorted((Path(__file__).parent.parent / "recipes" / "search").glob("*.yaml"))
OPEN = {
    "method": "ties",
    "parameters": {
        "density": {"search": [0.2, 0.4, 0.6]},
        "lambda": {"search": {"low": 0.6, "high": 1.4, "step": 0.4}},
    },
}


def space_of(**changes):
    """The one space of a small recipe."""
    content = {"base": "b", "experts": {"x": "x", "y": "y"}, "output": {"path": "o"}, **OPEN, **changes}
    return spaces(parse(yaml.safe_dump(content), "r.yaml", Path()), {}, ())[""]


def first(strategy, worth, count=100):
    """The first points of a strategy that is told what each is worth."""
    points = []
    try:
        point = next(strategy)
        while len(points) < count:
            points.append(point)
            point = strategy.send(worth(point))
    except StopIteration:
        pass
    return points


def hill(point):
    """Highest at density 0.4 and lambda 1.08."""
    return -abs(point["parameters.density"] - 0.4) - abs(point["parameters.lambda"] - 1.08)


# --- spaces ---------------------------------------------------------------------------------------


def test_a_mark_may_stand_for_any_value():
    space = space_of(
        experts={"x": {"model": "x", "weight": {"search": [1, 2]}}, "y": "y"},
        method=None,
        parameters={},
        pipeline=[
            {"bs": {"n": {"search": [1, 2]}, "m": 4}},
            "sum",
            {"scale": {"lambda": {"search": {"low": 0, "high": 1}}}},
        ],
    )
    names = [dimension.name for dimension in space.dimensions]
    assert names == ["experts.x.weight", "pipeline.0.bs.n", "pipeline.2.scale.lambda"]
    recipe = space.recipe({names[0]: 2, names[1]: 1, names[2]: 0.5})
    assert recipe.spelled_out()["pipeline"][2] == {"scale": {"lambda": 0.5}}
    assert recipe.experts["x"].weight == 2


def test_a_recipe_that_is_still_open_is_no_merge():
    text = yaml.safe_dump({"base": "b", "experts": {"x": "x"}, "output": {"path": "o"}, **OPEN}, sort_keys=False)
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert [fault.partition(": is left open")[0] for fault in caught.value.faults] == [
        "recipe:8: parameters.density",
        "recipe:13: parameters.lambda",
    ]


@pytest.mark.parametrize(
    ("mark", "fault"),
    [
        ([], "expected a list of values, or"),
        (3, "expected a list of values, or"),
        ({"low": 1}, "expected a list of values, or"),
        ({"low": 1, "high": 2, "stp": 1}, "unknown key stp"),
        ({"low": 1, "high": "much"}, "high is 'much', expected a number"),
        ({"low": 2, "high": 1}, "expected low < high"),
        ({"low": 0, "high": 1, "log": True}, "above 0"),
        ({"low": 0, "high": 1, "step": 0}, "above 0"),
    ],
)
def test_a_mark_that_says_nothing_is_told_with_its_place(mark, fault):
    with pytest.raises(RecipeError, match=f"r.yaml.*parameters.density: search: .*{fault}"):
        space_of(parameters={"density": {"search": mark}})


def test_a_variant_brings_its_own_method():
    text = {"base": "b", "experts": {"x": "x"}, "output": {"path": "o"}, "method": "ties", "parameters": {"density": 1}}
    variants = {"plain": {"method": "linear"}, "dense": {"parameters": {"density": {"search": [0.5]}}}}
    by_name = spaces(parse(yaml.safe_dump(text), "r", Path()), variants, ())
    assert by_name["plain"].recipe({}).spelled_out()["parameters"] == {"weight": 1, "normalize": True}
    assert by_name["dense"].recipe({"parameters.density": 0.5}).method == "ties"


# --- strategies -----------------------------------------------------------------------------------


def test_a_grid_is_every_combination_the_last_changing_first():
    points = [tuple(point.values()) for point in first(STRATEGIES["grid"](space_of(), 0), hill)]
    assert points == list(itertools.product([0.2, 0.4, 0.6], [0.6, 1, 1.4]))


def test_two_steps_are_a_coarse_grid_and_a_finer_one_around_its_best():
    points = first(STRATEGIES["two-step"](space_of(), 0), hill)
    assert len(points) == 9 + 9
    assert {point["parameters.density"] for point in points[9:]} == {0.4}
    assert [point["parameters.lambda"] for point in points[9:]] == [0.68, 0.76, 0.84, 0.92, 1, 1.08, 1.16, 1.24, 1.32]
    assert max(points, key=hill)["parameters.lambda"] == 1.08


@pytest.mark.parametrize("name", ["random", "tpe", "cmaes"])
def test_a_strategy_depends_on_its_seed_and_on_what_it_is_told_alone(name):
    if name != "random":
        pytest.importorskip("optuna")
        pytest.importorskip("cmaes")
    points, repeated_points, seeded_points = (first(STRATEGIES[name](space_of(), seed), hill, 12) for seed in (1, 1, 2))
    assert points == repeated_points
    assert points != seeded_points
    assert all(point["parameters.density"] in (0.2, 0.4, 0.6) for point in points)


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_a_model_of_the_objective_finds_its_neighbourhood(name):
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    space = space_of(
        parameters={"density": {"search": {"low": 0, "high": 1}}, "lambda": {"search": {"low": 0, "high": 3}}}
    )
    points = first(STRATEGIES[name](space, 0), hill, 60)
    assert max(map(hill, points)) > -0.15


def test_what_a_strategy_lacks_is_told():
    space = space_of(parameters={"lambda": {"search": {"low": 0, "high": 1}}})
    with pytest.raises(RecipeError, match=r"parameters.lambda: search: grid needs a step: between low and high"):
        next(STRATEGIES["grid"](space, 0))
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    with pytest.raises(RecipeError, match="method is none; take tpe"):
        next(STRATEGIES["cmaes"](space_of(method={"search": ["ties", "linear"]}), 0))


# --- searches -------------------------------------------------------------------------------------


def searched(folder, tmp_path, *, name="recipe", kind="answers", **changes):
    """A recipe on disk that leaves density and lambda open."""
    settings = {"strategy": "random", "trials": 4, "samples": 6, **changes.pop("search", {})}
    return file_of(
        tmp_path / f"{name}.yaml", text_of(folder, kind, TASKS[:2], **{**OPEN, "search": settings, **changes})
    )


def plain(result):
    """The trials without the time they took."""
    return {
        variant: [replace(trial, merge_seconds=0, judge_seconds=0) for trial in trials]
        for variant, trials in result.trials.items()
    }


NARROW = {"density": 0.4, "lambda": {"search": {"low": 0.8, "high": 1.2, "step": 0.2, "fine": 0.1}}}
"""Three coarse values, and then finer ones beside the best."""


CPU = RunOptions(device="cpu")
CHANGES = {"tpe": OPEN["parameters"], "two-step": NARROW}


class Killed(BaseException):
    """What stops a search in the middle."""


def die_at(monkeypatch, merges):
    """Lets the process die when it begins that many merges."""
    begun, merged = itertools.count(1), ModelHost.merged

    def dying(self, recipe):
        if next(begun) == merges:
            raise Killed
        return merged(self, recipe)

    monkeypatch.setattr(ModelHost, "merged", dying)


@pytest.mark.parametrize("strategy", ["two-step", "tpe"])
def test_a_search_that_is_killed_and_goes_on_ends_with_the_same_trials(demo_folder, tmp_path, monkeypatch, strategy):  # noqa: F811
    if strategy == "tpe":
        pytest.importorskip("optuna")
    monkeypatch.setattr(strategies, "STARTUP", 2)
    settings = {"strategy": strategy, "trials": 5, "objective": "loss"}
    path = searched(demo_folder, tmp_path, kind="texts", parameters=CHANGES[strategy], search=settings)
    search_result = search(path, options=CPU, to=tmp_path / "whole")

    with monkeypatch.context() as patch:
        die_at(patch, merges=3)
        with pytest.raises(Killed):
            search(path, options=CPU, to=tmp_path / "killed")
    with (tmp_path / "killed" / "trials.jsonl").open("a") as record:
        record.write('{"trial": 9, "vari')  # and it was writing
    resumed = search(path, options=CPU, to=tmp_path / "killed")

    assert plain(resumed) == plain(search_result)
    assert resumed.report == search_result.report
    assert (tmp_path / "killed" / "best.yaml").read_text() == (tmp_path / "whole" / "best.yaml").read_text()


def test_a_finished_search_computes_nothing_again_and_more_trials_go_on_from_there(demo_folder, tmp_path, monkeypatch):  # noqa: F811
    path = searched(demo_folder, tmp_path)
    first_found = search(path, options=CPU)
    with monkeypatch.context() as patch:
        die_at(patch, 1)
        assert search(path, options=CPU) == first_found
    search_result = search(path, ["search.trials=6"], CPU)
    assert plain(search_result)[""][:4] == plain(first_found)[""]
    assert len(search_result.trials[""]) == 6


def test_the_record_of_another_search_is_not_gone_on_with(demo_folder, tmp_path):  # noqa: F811
    path = searched(demo_folder, tmp_path, search={"trials": 1})
    search(path, options=CPU)
    with pytest.raises(RecipeError, match="is the record of another search: recipe differ"):
        search(path, ["search.seed=1"], CPU)
    with pytest.raises(RecipeError, match="recipe, report data differ"):
        search(path, ["evaluation.samples=11"], CPU)
    assert len(search(path, ["search.seed=1"], CPU, force=True).trials[""]) == 1


def test_a_search_does_not_go_on_with_another_version_of_a_package_of_methods(demo_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(PACKAGES, "merger.methods.ties", Package("acme-merging", "1.2"))
    path = searched(demo_folder, tmp_path, search={"trials": 1})
    search(path, options=CPU)
    monkeypatch.setitem(PACKAGES, "merger.methods.ties", Package("acme-merging", "1.3"))
    with pytest.raises(RecipeError, match="is the record of another search: versions differ"):
        search(path, options=CPU)


def test_the_report_is_of_examples_that_the_search_never_saw(demo_folder, tmp_path):  # noqa: F811
    path = searched(demo_folder, tmp_path, search={"trials": 1})
    search_result = search(path, options=CPU)
    header = json.loads((tmp_path / "recipe.search" / "trials.jsonl").read_text().splitlines()[0])
    assert {task: value.sha256 for task, value in search_result.report.tasks.items()} == header["report data"]
    assert header["search data"].keys() == header["report data"].keys() == set(TASKS[:2])
    assert not set(header["search data"].values()) & set(header["report data"].values())


def test_variants_have_the_same_budget_and_a_row_each(demo_folder, tmp_path, merger):  # noqa: F811
    variants = {
        "average": {"method": "linear"},
        "ties": OPEN,
        "obim": {"method": "obim", "parameters": {"density": {"search": [0.2, 0.8]}}},
    }
    path = searched(demo_folder, tmp_path, method=None, parameters=None, search={"trials": 2, "variants": variants})
    ran = merger("search", path, "--json", "--device", "cpu")
    assert ran.code == 0
    content = json.loads(ran.out)
    assert {name: len(trials) for name, trials in content["trials"].items()} == {"average": 1, "ties": 2, "obim": 1}
    assert [row["model"] for row in content["report"]["rows"] if row["kind"] == "merge"] == list(variants)
    assert "points left out, as their values do not go together: 1, the first of them " in ran.err
    page = (tmp_path / "recipe.search" / "report.md").read_text()
    assert '| obim | `{"density": 0.2}` |' in page


def test_the_best_recipe_merges_from_where_it_lies(demo_folder, tmp_path, merger):  # noqa: F811
    path = searched(demo_folder, demo_folder, name="found", search={"trials": 1}, base="models/base")
    assert merger("search", path, "--to", tmp_path / "found", "-q", "--device", "cpu").code == 0
    best = tmp_path / "found" / "best.yaml"
    assert Recipe.load(best).spelled_out()["parameters"]["density"] in (0.2, 0.4, 0.6)
    assert "search" not in yaml.safe_load(best.read_text())
    assert merger("plan", best, "--json").code == 0


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"search": {"strategy": "gird"}}, "did you mean 'grid'?"),
        ({"search": {"trials": None}}, "search.trials: is missing; random has no end of its own"),
        ({"search": {"objective": "upper_"}}, "there is no 'upper_'; did you mean 'upper'?"),
        ({"search": {"objective": "loss"}}, "no task is of plain text"),
        ({"search": {"samples": 31}}, "but the search takes 31 and the report 10 others"),
        ({"parameters": {"density": 0.5}}, "leaves nothing open"),
        ({"parameters": {"densty": {"search": [0.5]}}}, "did you mean 'density'?"),
        ({"evaluation": None}, "has no evaluation"),
        ({"output": {"path": {"search": ["a", "b"]}}}, "output.path: is no value that a search can move"),
    ],
)
def test_a_search_that_cannot_be_is_told_before_it_begins(demo_folder, tmp_path, merger, changes, fault):  # noqa: F811
    ran = merger("search", searched(demo_folder, tmp_path, **changes))
    assert ran.code in (2, 3)
    assert fault in ran.err
    assert not (tmp_path / "recipe.search").exists()


# --- shipped --------------------------------------------------------------------------------------

shipped = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


@shipped
def test_every_variant_of_a_shipped_search_makes_recipes(path):
    document = read(path)
    settings = search_of(document)
    for space in spaces(document, settings.variants, ()).values():
        assert example(space).evaluation is not None


@shipped
def test_the_schema_accepts_a_shipped_search(path):
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())
    assert path.read_text().startswith("# yaml-language-server: $schema=../schema.json\n")


def test_pictures_are_drawn(demo_folder, tmp_path, merger):  # noqa: F811
    pytest.importorskip("matplotlib")
    path = searched(demo_folder, tmp_path, search={"trials": 2})
    assert merger("search", path, "--plot", tmp_path / "trials.png", "-q", "--device", "cpu").code == 0
    best = tmp_path / "recipe.search" / "best.yaml"
    assert merger("eval", best, "--plot", tmp_path / "kept.svg", "-q", "--device", "cpu").code == 0
    assert (tmp_path / "trials.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "kept.svg").read_text()
