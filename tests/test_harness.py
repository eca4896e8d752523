"""Tasks of lm-evaluation-harness: figures against ones computed apart, beside merger's own in a table, and faults."""

from __future__ import annotations

import json
import math
import sys
from functools import partial

import jsonschema
import pytest
import torch
import yaml
from tasks import TASKS, demo_folder, file_of, text_of, write  # noqa: F401 a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

from merger.demo import tasks as demo_tasks
from merger.evaluation.harness import Metric, Score
from merger.evaluation.measures import Outcome
from merger.evaluation.scores import Entry, compare, json_schema
from merger.evaluation.tables import cells, headings, legend
from merger.evaluation.tasks import Example, Task

TEXTS = [prompt + answer for prompt, answer in demo_tasks.examples("shift", "heldout", 6)]
QUESTIONS = [
    {"prompt": prompt, "choices": [answer[::-1], answer, answer.swapcase()], "answer": 1}
    for name in TASKS
    for prompt, answer in demo_tasks.examples(name, "heldout", 6)
    if answer != answer[::-1]
]


@pytest.fixture
def recipe_file(demo_folder, tmp_path):  # noqa: F811
    content = text_of(demo_folder)
    content["evaluation"]["samples"] = 2  # the harness takes its own
    return file_of(tmp_path / "recipe.yaml", content)


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A folder with two tasks: demo_choices, and demo_texts whose likelihoods are rolled over whole texts."""
    task_manager = pytest.importorskip("lm_eval.tasks").TaskManager
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", partial(task_manager, include_defaults=False)
    )  # 14,000 names: 10 s
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    task(
        folder,
        "demo_choices",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{prompt}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        target_delimiter="",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    task(
        folder,
        "demo_texts",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    return folder


def task(folder, name, records, **settings):
    data = write(folder / f"{name}.jsonl", records)
    dataset = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    file_of(folder / f"{name}.yaml", {"task": name, **dataset, **settings})


# --- its figures ----------------------------------------------------------------------------------


def test_models_in_memory_have_the_harness_figures_that_transformers_gives(merger, recipe_file, own_tasks, demo_folder):  # noqa: F811
    merger("run", recipe_file, "-q")
    ran = merger("eval", recipe_file, "--lm-eval", "demo_choices,demo_texts", "--include-path", own_tasks, "--json")
    assert (ran.code, ran.err) == (0, "")
    content = json.loads(ran.out)
    jsonschema.validate(content, json_schema())
    rows = {row["model"]: row["lm_eval"] for row in content["rows"]}

    for label, path in {"recipe": recipe_file.parent / "merged", "shift": demo_folder / "models" / "shift"}.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        total = sum(likelihood(model, tokenizer, "", text) for text in TEXTS)
        words, size = sum(len(text.split(" ")) for text in TEXTS), sum(len(text.encode()) for text in TEXTS)
        expected = {
            "demo_choices acc": accuracy(model, tokenizer),
            "demo_texts word_perplexity": math.exp(-total / words),
            "demo_texts bits_per_byte": -total / size / math.log(2),
        }
        assert {name: score["value"] for name, score in rows[label].items()} == pytest.approx(expected, rel=1e-4)
        expected_accuracy = expected["demo_choices acc"]
        error = math.sqrt(expected_accuracy * (1 - expected_accuracy) / (len(QUESTIONS) - 1))
        assert rows[label]["demo_choices acc"]["stderr"] == pytest.approx(error)
    assert 0 < min(row["demo_choices acc"]["value"] for row in rows.values()) < 1


def accuracy(model, tokenizer):
    hits = []
    for question in QUESTIONS:
        values = [likelihood(model, tokenizer, question["prompt"], choice) for choice in question["choices"]]
        hits.append(values.index(max(values)) == question["answer"])
    return sum(hits) / len(hits)


@torch.no_grad()
def likelihood(model, tokenizer, prompt, text):
    """The summed log-probability of a text after a prompt, or after the token that begins a text."""
    prompt_ids = tokenizer(prompt.rstrip())["input_ids"] or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt_ids, *tokenizer(prompt + text)["input_ids"][len(prompt_ids) if prompt else 0 :]]])
    steps = model(ids).logits[0].log_softmax(-1)
    return sum(steps[at - 1, ids[0, at]].item() for at in range(len(prompt_ids), ids.shape[1]))


def test_the_harness_and_merger_agree_on_the_same_questions(merger, recipe_file, own_tasks):
    flags = ("--lm-eval", "demo_*", "--include-path", own_tasks)
    data = ("--data", f"shift={own_tasks}/demo_choices.jsonl", "--samples", 100)
    ran = merger("eval", recipe_file, *data, *flags, "--json", "-q")
    for row in json.loads(ran.out)["rows"]:
        assert row["lm_eval"]["demo_choices acc"]["value"] == row["tasks"]["shift"]["value"]


def test_only_the_first_examples_are_read_if_there_is_a_limit(merger, recipe_file, own_tasks):
    flags = ("--lm-eval", "demo_choices", "--include-path", own_tasks, "--limit", 3, "--num-fewshot", 1)
    ran = merger("eval", recipe_file, *flags)
    assert (ran.code, ran.err) == (0, "")
    assert "3 of demo_choices; forward passes in float32" in ran.out
    assert "± its own standard error" in ran.out


# --- in the table ---------------------------------------------------------------------------------

ACC = Metric("quiz", "acc", higher_is_better=True, examples=50, num_fewshot=0, version="1.0")
PPL = Metric("prose", "word_perplexity", higher_is_better=False, examples=7, num_fewshot=0, version="2")
EITHER = Metric("odd", "length (first)", higher_is_better=None, examples=7, num_fewshot=0, version="2")


def entries(outcomes):
    figures = {"base": (0.25, 40.0), "a": (0.75, 30.0), "b": (0.5, 20.0), "merged": (0.6, 25.0)}
    kinds = {"base": "base", "merged": "merge"}
    return [
        Entry(
            model,
            kinds.get(model, "expert"),
            outcomes,
            lm_eval={ACC: Score(acc, 0.07), PPL: Score(ppl, None), EITHER: Score(3.0, None)},
        )
        for model, (acc, ppl) in figures.items()
    ]


@pytest.fixture
def _known_version(monkeypatch):
    monkeypatch.setattr("merger.evaluation.scores.metadata.version", lambda name: "0.0")


@pytest.mark.usefixtures("_known_version")
def test_figures_of_the_harness_stand_beside_the_others_with_its_standard_error():
    quiz = Task("t", "choices", (Example("p", ("a", "b")), Example("q", ("a", "b"))))
    comparison = compare([quiz], entries({"t": Outcome(torch.ones(2).numpy(), torch.ones(2).numpy())}), "float32")
    assert list(headings(comparison))[-3:] == ["quiz acc", "prose word_perplexity", "odd length (first)"]
    assert cells(comparison, comparison.rows[-1])[-3:] == ["0.6000 ± 0.0700", "25.0000", "3.0000"]
    assert "examples: 2 of t, 50 of quiz, 7 of prose, 7 of odd; forward passes in float32" in legend(comparison)


@pytest.mark.usefixtures("_known_version")
def test_the_ideal_is_the_better_expert_where_the_harness_says_what_is_better():
    ideal = next(row for row in compare([], entries({}), "float32").rows if row.kind == "ideal")
    assert ideal.lm_eval == {"quiz acc": Score(0.75, 0.07), "prose word_perplexity": Score(20.0, None)}


@pytest.mark.usefixtures("_known_version")
def test_the_harness_alone_leaves_no_mean_and_no_share():
    comparison = compare([], entries({}), "float32")
    assert (comparison.rows[-1].mean, comparison.rows[-1].kept, comparison.notes) == (None, None, ())
    assert list(headings(comparison)) == list(comparison.lm_eval)


# --- faults ---------------------------------------------------------------------------------------


def test_without_the_package_it_is_said_how_to_have_it(merger, recipe_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    ran = merger("eval", recipe_file, "--lm-eval", "arc_easy")
    assert ran.code == 2
    assert ran.err.startswith("error: --lm-eval needs lm-evaluation-harness")
    assert "pip install 'merger[lm-eval]'" in ran.err


def test_options_of_the_harness_alone_ask_for_nothing(merger, recipe_file):
    ran = merger("eval", recipe_file, "--limit", 3, "--num-fewshot", 1)
    assert ran.code == 2
    assert "--limit, --num-fewshot: how tasks of lm-evaluation-harness are run; name them with --lm-eval" in ran.err


def test_what_the_harness_does_not_know_or_cannot_load_is_told_before_any_model_is(merger, recipe_file, own_tasks):
    task(own_tasks, "gone", QUESTIONS, output_type="multiple_choice", doc_to_text="{{prompt}}")
    (own_tasks / "gone.jsonl").unlink()
    cases = {
        ("--lm-eval", "demo_choice,nothing_at_all"): [
            "there is no task 'demo_choice'; did you mean 'demo_choices'",
            "there is no task 'nothing_at_all'; ",
        ],
        ("--lm-eval", "gone"): ["--lm-eval gone: cannot be loaded: FileNotFoundError"],
        ("--lm-eval", "demo_choices", "--include-path", own_tasks / "nowhere"): ["there is no such folder"],
    }
    for arguments, fragments in cases.items():
        ran = merger("eval", recipe_file, "--include-path", own_tasks, *arguments)
        assert ran.code in (2, 3), ran.err
        assert len(ran.err.splitlines()) == len(fragments)
        for part, line in zip(fragments, ran.err.splitlines(), strict=True):
            assert part in line


def test_data_that_is_not_in_the_cache_is_not_fetched_offline(merger, recipe_file, own_tasks):
    content = yaml.safe_load((own_tasks / "demo_texts.yaml").read_text())
    remote_task = {"task": "far", "dataset_path": "someone/far-away", "dataset_kwargs": {}}
    file_of(own_tasks / "far.yaml", {**content, **remote_task})
    ran = merger("eval", recipe_file, "--lm-eval", "far", "--include-path", own_tasks, "--offline")
    assert ran.code == 3
    assert ran.err.startswith("error: --lm-eval far: cannot be loaded: ")
    assert ran.err.endswith("; --offline takes only data that is in the cache\n")


def test_what_stops_the_harness_on_the_way_is_told_in_a_line(merger, recipe_file, own_tasks):
    flags = ("--lm-eval", "demo_choices", "--include-path", own_tasks, "--num-fewshot", 99)
    ran = merger("eval", recipe_file, *flags)
    assert ran.code == 3
    assert ran.err.startswith("error: --lm-eval: the harness stopped at base: ValueError")
