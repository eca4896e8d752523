"""The pages of `merger eval` and `merger search`: their sentences are those of the figures."""

import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from tasks import demo_folder, text_of  # noqa: F401 a fixture

from merger.evaluation.measures import Outcome
from merger.evaluation.pages import comparison_page, findings, opening, search_page
from merger.evaluation.scores import Entry, compare
from merger.evaluation.search import SearchResult
from merger.evaluation.search.loop import Trial
from merger.evaluation.tasks import Example, Task

TASKS = tuple(Task(name, "text", tuple(Example("", (f"{name} {i}",)) for i in range(4))) for name in ("a", "b"))
REFERENCES = {"base": (3.0, 4.0), "a": (2.0, 4.5), "b": (3.2, 3.0)}


def outcomes(a, b, spread=0.0):
    """Outcomes with these mean losses; ``spread`` takes some examples apart from the others."""
    apart = spread * np.array([-1, 1, -0.5, 0.5])
    return {task: Outcome(10 * (loss + apart), np.full(4, 10.0)) for task, loss in (("a", a), ("b", b))}


def comparison_of(spread=0.0, **merges):
    """The comparison of merges, given by their losses on both tasks."""
    entries = [
        Entry(name, "base" if name == "base" else "expert", outcomes(*loss)) for name, loss in REFERENCES.items()
    ]
    return compare(
        TASKS, [*entries, *(Entry(name, "merge", outcomes(*loss, spread)) for name, loss in merges.items())], ""
    )


def test_the_best_merge_is_named_with_its_share_and_the_others_with_how_far_they_are_behind():
    assert list(findings(comparison_of(half=(2.5, 3.5), more=(2.2, 3.4)))) == [
        "Of the experts' gains over the base more keeps most: 70.0 % [70.0, 70.0].",
        "Behind more beyond the choice of examples: half by 20.0 points [20.0, 20.0].",
    ]


def test_merges_that_the_examples_do_not_tell_apart_are_said_to_be_so():
    line = list(findings(comparison_of(2.0, half=(2.5, 3.5), same=(2.5, 3.5))))[1]
    assert line == "Not told apart from half by these examples: same (behind by 0.0 points [0.0, 0.0])."


def test_of_a_single_merge_the_share_alone_is_told():
    (line,) = findings(comparison_of(half=(2.5, 3.5)))
    assert line == "Of the experts' gains over the base half keeps: 50.0 % [50.0, 50.0]."


def test_where_no_expert_gained_there_is_nothing_to_keep():
    entries = [Entry("base", "base", outcomes(1, 1)), Entry("a", "expert", outcomes(2, 2))]
    comparison = compare(TASKS, [*entries, Entry("m", "merge", outcomes(2, 2))], "")
    assert list(findings(comparison)) == []
    text = comparison_page(comparison)
    assert "a: is not better than the base on its own task" in text
    assert "<svg" not in text


def test_a_page_names_models_and_examples_and_has_the_cells_of_every_row():
    comparison = comparison_of(half=(2.5, 3.5), more=(2.2, 3.4))
    text = comparison_page(comparison)
    expected = "half, more beside the base and the experts a, b, on the same held-out examples: 4 of a, 4 of b."
    assert opening(comparison) == expected
    assert f'<p class="opening">{expected}</p>' in text
    rows = re.findall(r'<th scope="row">(?:<span.*?></span>)?(.*?)</th>', text)
    assert rows == ["base", "expert a", "expert b", "ideal", "half", "more"]
    assert "more is below the best single expert on a (expert a, loss 0.2 higher [0.2,\u00a00.2])" in text


def test_the_colour_of_an_expert_is_that_of_its_task_in_the_chart():
    text = comparison_page(comparison_of(half=(2.5, 3.5)))
    assert 'background:var(--series1)"></span>expert b' in text
    legend = re.findall(r"<text [^>]*>(a|b|mean)</text>", text)
    assert legend == ["a", "b", "mean"]


# --- searches -----------------------------------------------------------------------------------------


def trials(*objectives):
    """Trials of a density, some of which failed."""
    return tuple(
        Trial("", i, {"parameters.density": i / 10}, value, {}, 1.5, 0.5, None if value is not None else "no memory")
        for i, value in enumerate(objectives, 1)
    )


def result_of(*objectives):
    tried = trials(*objectives)
    best = max((trial for trial in tried if trial.objective is not None), key=lambda trial: trial.objective)
    return SearchResult("r.search", "kept", {"": tried}, {"": best}, comparison_of(r=(2.5, 3.5)))


def test_the_page_of_a_search_names_the_best_trial_its_setting_and_the_cost():
    text = search_page(result_of(0.2, 0.9, None, 0.5), "r")
    assert "The best trial by the search data: trial 2, kept 0.9000, with density 0.2." in text
    assert "r: 4 trials. r beside the base" in text
    assert "All trials took 6.0\u00a0s of merging and 2.0\u00a0s of judging." in text
    assert "1 of them failed, the first by: no memory" in text


def test_the_best_trials_are_in_a_table_the_best_first():
    text = search_page(result_of(*(i / 100 for i in range(12))), "r")
    table = text.partition("the best 10 of 12")[2]
    names = re.findall(r'<th scope="row">(.*?)</th><td class="right">(.*?)</td><td>(.*?)</td>', table)
    assert names[0] == ("12", "0.1100", "density 1.2")
    assert [int(name) for name, *_ in names] == list(range(12, 2, -1))


def test_variants_are_named_with_their_trials():
    result = result_of(0.2, 0.9)
    variants = {name: tuple(replace(trial, variant=name) for trial in result.trials[""]) for name in ("ties", "dare")}
    best = {name: tried[-1] for name, tried in variants.items()}
    text = search_page(replace(result, trials=variants, best=best), "r")
    assert "r: 4 trials." in text
    assert {"ties 2", "dare 2"} <= set(re.findall(r'<th scope="row">(.*?)</th>', text))


def test_both_commands_write_their_page(merger, demo_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    content = text_of(demo_folder, method="task_arithmetic", parameters={"lambda": {"search": [0.3, 0.5]}})
    content["search"] = {"samples": 5}
    (tmp_path / "open.yaml").write_text(yaml.safe_dump(content))
    ran = merger("search", "open.yaml", "--html", "search.html", "-q", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "What a search found" in (tmp_path / "search.html").read_text()
    ran = merger("eval", "open.search/best.yaml", "--html", "eval.html", "-q", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "<h1>What merges kept</h1>" in (tmp_path / "eval.html").read_text()


@pytest.mark.parametrize("command", ["eval", "search"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(merger, tmp_path, command):
    ran = merger(command, tmp_path / "none.yaml", "--html", tmp_path / "no" / "page.html")
    expected = f"error: --html {tmp_path}/no/page.html: expected a file in a folder that is there\n"
    assert (ran.code, ran.err) == (2, expected)
