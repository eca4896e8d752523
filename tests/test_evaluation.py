"""Judging: measures against transformers' own, merges in memory against those on disk, intervals, and the command."""

from __future__ import annotations

import json
import re

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tasks import TASKS, demo_folder, file_of, recipe_of, text_of, write  # noqa: F401 a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

import merger as library
from merger.calibration import collect
from merger.demo import tasks as demo_tasks
from merger.errors import CheckpointError, RecipeError
from merger.evaluation import evaluate, tasks
from merger.evaluation.measures import Outcome, TaskEvaluator, log_likelihoods, tokenize_task
from merger.evaluation.model_host import ModelHost
from merger.evaluation.scores import Entry, compare, json_schema, objective
from merger.evaluation.tables import shortfall_lines
from merger.evaluation.tasks import Example, Task, check_apart, load, split
from merger.options import RunOptions
from merger.recipe.recipe import Recipe
from merger.recipe.sections import TextSource


@pytest.fixture(scope="module")
def expert(demo_folder):  # noqa: F811
    path = demo_folder / "models" / "shift"
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval(), AutoTokenizer.from_pretrained(path)


# --- measures -------------------------------------------------------------------------------------


def test_losses_are_those_of_transformers_for_the_same_batch(demo_folder, expert):  # noqa: F811
    model, tokenizer = expert
    (task,) = load({"shift": "data/shift.texts.jsonl"}, demo_folder, 30)
    prepared = tokenize_task(task, tokenizer, 64)

    result = TaskEvaluator((prepared,), tokenizer).outcomes(model)["shift"]

    batch = tokenizer([example.replies[0] for example in task.examples], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        assert result.value == pytest.approx(model(**batch, labels=labels).loss.item(), abs=1e-4)


def test_each_texts_loss_is_its_own_whatever_stands_beside_it(demo_folder, expert):  # noqa: F811
    model, tokenizer = expert
    texts = ["shift: ab -> bc", "shift: abcdef -> bcdefg", "upper: q"]
    sequences = [tokenizer(text)["input_ids"] for text in texts]

    batched = log_likelihoods(model, sequences, [1, 1, 1])

    single = [log_likelihoods(model, [ids], [1])[0] for ids in sequences]
    assert batched == pytest.approx(single, abs=1e-4)


@pytest.mark.parametrize(("step", "few", "most"), [(0.15, 1, 11), (1.0, 12, 12)])
def test_exact_answers_are_counted_as_one_prompt_at_a_time_would(demo_folder, expert, step, few, most):  # noqa: F811
    trained, tokenizer = expert
    model = AutoModelForCausalLM.from_pretrained(demo_folder / "models" / "base", dtype="float32").eval()
    with torch.no_grad():  # a model on the way from the base to the expert answers some prompts right
        for weight, target in zip(model.parameters(), trained.parameters(), strict=True):
            weight.lerp_(target, step)
    answered = {}
    for name in TASKS:
        (task,) = load({name: f"data/{name}.answers.jsonl"}, demo_folder, 12)
        answered[name] = TaskEvaluator(
            (tokenize_task(task, tokenizer, 64),), tokenizer, (tokenizer.eos_token_id,)
        ).outcomes(model)
        pairs = [(example.prompt, example.replies[0]) for example in task.examples]
        expected = [demo_tasks.accuracy(model, tokenizer, [pair]) for pair in pairs]
        assert answered[name][name].total.tolist() == expected
    assert few <= answered["shift"]["shift"].total.sum() <= most


def test_the_likeliest_choice_is_taken(expert):
    model, tokenizer = expert
    examples = tuple(
        Example(prompt, (answer[::-1], answer, answer.upper()), 1)
        for prompt, answer in demo_tasks.examples("shift", "heldout", 12)
        if answer != answer[::-1]
    )
    wrong_examples = tuple(Example(example.prompt, example.replies, 2) for example in examples)
    right_task, wrong_task = (
        tokenize_task(Task("c", "choices", choices), tokenizer, 64) for choices in (examples, wrong_examples)
    )

    assert TaskEvaluator((right_task,), tokenizer).outcomes(model)["c"].value == 1
    assert TaskEvaluator((wrong_task,), tokenizer).outcomes(model)["c"].value == 0


def test_a_choice_is_scored_without_its_prompt(expert):
    model, tokenizer = expert
    prepared = tokenize_task(Task("c", "choices", (Example("shift: ab -> ", ("bc", "xyz"), 0),)), tokenizer, 64)
    ids = torch.tensor([tokenizer("shift: ab -> bc")["input_ids"]])
    prompt = len(tokenizer("shift: ab ->")["input_ids"])

    with torch.no_grad():
        steps = model(ids).logits[0].log_softmax(-1)
    expected = sum(steps[at - 1, ids[0, at]].item() for at in range(prompt, ids.shape[1]))
    assert log_likelihoods(model, prepared.sequences, prepared.starts)[0] == pytest.approx(expected, abs=1e-4)


# --- merges in memory -----------------------------------------------------------------------------

METHODS = {
    "ties": {"method": "ties", "parameters": {"density": 0.3}},
    "dare": {"method": "dare_linear", "parameters": {"density": 0.5}},
    "obim": {"method": "obim"},
    "regmean": {"method": "regmean"},
    "wudi": {"method": "wudi"},
}


@pytest.fixture(scope="module")
def bench():
    with ModelHost(RunOptions(device="cpu"), "float32") as host:
        yield host


@pytest.mark.parametrize("name", [*METHODS, "regmean"])  # and once more with Gram matrices that are there already
def test_a_merge_in_memory_has_the_bits_of_one_on_disk(demo_folder, tmp_path, bench, name):  # noqa: F811
    recipe = recipe_of(demo_folder, **METHODS[name], output={"path": str(tmp_path / "out"), "dtype": "bfloat16"})
    library.merge(recipe, RunOptions(device="cpu"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")

    model, checkpoint = bench.merged(recipe)

    assert checkpoint.tensors.keys() == tensors.keys()
    for tensor, expected in tensors.items():
        assert torch.equal(checkpoint.read(tensor).view(torch.uint8), expected.view(torch.uint8)), tensor
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(parameters[tensor], stored.float()) for tensor, stored in tensors.items())


@pytest.mark.parametrize("name", ["obim", "regmean"])  # statistics before the merge, and Gram matrices with it
def test_a_merge_in_memory_gives_hidden_states_the_memory_that_one_on_disk_gives(
    demo_folder,  # noqa: F811
    tmp_path,
    monkeypatch,
    name,
):
    budgets = []

    def recorded(*arguments, hidden_memory, **options):
        budgets.append(hidden_memory)
        return collect(*arguments, hidden_memory=hidden_memory, **options)

    monkeypatch.setattr("merger.calibration.statistics.collect", recorded)
    recipe = recipe_of(demo_folder, **METHODS[name], output={"path": str(tmp_path / "out")})
    options = RunOptions(device="cpu", max_memory=2 << 30)
    monkeypatch.setenv("MERGER_CACHE", str(tmp_path / "one"))
    library.merge(recipe, options)
    on_disk, budgets = budgets, []

    monkeypatch.setenv("MERGER_CACHE", str(tmp_path / "other"))
    with ModelHost(options) as bench:
        bench.merged(recipe)

    assert len(on_disk) == 3
    assert budgets == on_disk


def test_a_merge_in_memory_answers_as_transformers_does_with_the_one_on_disk(demo_folder, tmp_path, bench):  # noqa: F811
    recipe = recipe_of(demo_folder, output={"path": str(tmp_path / "out")})
    library.merge(recipe, RunOptions(device="cpu"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval()
    ids = torch.tensor([[1, 5, 9, 12, 4]])

    model, _ = bench.merged(recipe)

    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


# --- examples -------------------------------------------------------------------------------------


def test_the_same_examples_are_chosen_however_a_file_orders_them(tmp_path):
    records = [{"text": f"text {i}"} for i in range(20)]
    ordered = load({"t": str(write(tmp_path / "one.jsonl", records))}, tmp_path, 5)
    reordered = load({"t": str(write(tmp_path / "other.jsonl", [*records[::-1], records[3]]))}, tmp_path, 5)
    assert ordered == reordered
    assert ordered[0].sha256 == reordered[0].sha256


def test_search_and_report_share_no_example_and_the_report_stays(tmp_path):
    write(tmp_path / "t.jsonl", [{"text": f"text {i}"} for i in range(20)])
    parts = split({"t": "t.jsonl"}, tmp_path, report=8, search=6)
    assert not set(parts.search[0].examples) & set(parts.report[0].examples)
    assert load({"t": "t.jsonl"}, tmp_path, 8) == parts.report


def test_too_few_examples_for_search_and_report_are_told(tmp_path):
    write(tmp_path / "t.jsonl", [{"text": f"text {i}"} for i in range(20)])
    with pytest.raises(CheckpointError, match="has 20 different examples, but the search takes 15 and the report 8"):
        split({"t": "t.jsonl"}, tmp_path, report=8, search=15)


@pytest.mark.parametrize(
    ("records", "fault"),
    [
        ([{"body": "x"}], "t.jsonl:1: expected text, or prompt and answer, .*; found body"),
        ([{"prompt": "x", "answer": " "}], "t.jsonl:1: expected text"),
        ([{"prompt": "x", "choices": ["a", "b"], "answer": "c"}], "answer is 'c', expected one of the choices"),
        ([{"prompt": "x", "choices": ["a", "b"], "answer": 2}], "answer is 2"),
        ([{"prompt": "x", "choices": ["a"], "answer": "a"}], "2 or more"),
        ([{"text": "x"}, {"prompt": "x", "answer": "y"}], "t.jsonl:2: is answer, but .*t.jsonl:1 text"),
        ([], "holds no example"),
    ],
)
def test_examples_that_cannot_be_used_are_told_with_their_place(tmp_path, records, fault):
    write(tmp_path / "t.jsonl", records)
    with pytest.raises(CheckpointError, match=fault):
        load({"t": "t.jsonl"}, tmp_path, 5)


@pytest.mark.parametrize(
    ("choices", "answer", "correct"),
    [
        (["x", "y"], 1, 1),
        (["x", "y"], "1", 1),
        (["x", "y"], "y", 1),
        (["7", "1"], "1", 1),
        ([5, 0], 0, 0),
        ([5, 0], 5, 0),
    ],
)
def test_the_right_choice_is_told_by_its_number_or_its_text(tmp_path, choices, answer, correct):
    write(tmp_path / "t.jsonl", [{"prompt": "p", "choices": choices, "answer": answer}])
    assert load({"t": "t.jsonl"}, tmp_path, 5)[0].examples[0].correct == correct


@pytest.fixture
def sourced(tmp_path):
    """The only task of these sources of text, of two files of ten examples with columns of their own."""
    write(tmp_path / "a.jsonl", [{"ctx": f"a{i}", "endings": ["x", "y"], "label": i % 2} for i in range(10)])
    write(tmp_path / "b.jsonl", [{"ctx": f"b{i}", "endings": ["x", "y"], "label": i % 2} for i in range(10)])
    columns = {"prompt": "ctx", "choices": "endings", "answer": "label"}

    def sourced(samples, /, **counts):
        data = [TextSource(file=f"{name}.jsonl", samples=count, fields=columns) for name, count in counts.items()]
        return load({"t": data}, tmp_path, samples)[0]

    return sourced


def test_a_task_has_examples_of_every_source_as_many_as_its_count(sourced):
    task = sourced(100, a=3, b=4)
    assert task.kind == "choices"
    assert [sum(e.prompt.startswith(name) for e in task.examples) for name in "ab"] == [3, 4]
    assert all(e.correct == int(e.prompt[1:]) % 2 and e.replies == ("x", "y") for e in task.examples)


def test_a_task_has_at_most_the_samples_of_the_section(sourced):
    assert len(sourced(5, a=3, b=4).examples) == 5
    assert sourced(100, a=None, b=None).sha256 != sourced(100, a=None).sha256


def test_calibration_text_of_any_source_is_no_held_out_text(tmp_path):
    write(tmp_path / "a.jsonl", [{"question": f"a{i}", "answer": "1"} for i in range(4)])
    write(tmp_path / "b.jsonl", [{"text": "b"}])
    source = {"file": "a.jsonl", "fields": {"prompt": "question"}}
    content = {"base": "b", "experts": {"e": "e"}, "method": "linear", "output": {"path": "out"}}
    recipe = Recipe.parse({**content, "calibration": {"data": {"e": ["b.jsonl", source]}}}, tmp_path)
    with pytest.raises(RecipeError, match=r"t: 4 of 4 examples are calibration text too \(a.jsonl\)"):
        check_apart(recipe, load({"t": TextSource(**source)}, tmp_path, 5))


def test_calibration_text_is_no_held_out_text(demo_folder):  # noqa: F811
    held_out = tasks.load({"upper": "data/upper.jsonl"}, demo_folder, 5)
    with pytest.raises(RecipeError, match=r"5 of 5 examples are calibration text too .*allow_calibration_text=True"):
        check_apart(recipe_of(demo_folder), held_out)
    check_apart(recipe_of(demo_folder), tasks.load({"upper": "data/upper.texts.jsonl"}, demo_folder, 5))


# --- scores ---------------------------------------------------------------------------------------


def loss_task(name, count=4):
    return Task(name, "text", tuple(Example("", (f"{name} {i}",)) for i in range(count)))


def did(**losses):
    """Outcomes with these losses on all examples of each task, a little apart from one example to the next."""
    wiggle = np.array([-0.1, 0.1, -0.05, 0.05])
    return {task: Outcome(10 * (value + wiggle), np.full(4, 10.0)) for task, value in losses.items()}


ENTRIES = (
    Entry("base", "base", did(a=3.0, b=4.0)),
    Entry("a", "expert", did(a=2.0, b=4.5)),
    Entry("b", "expert", did(a=3.2, b=3.0)),
    Entry("half", "merge", did(a=2.5, b=3.5)),
    Entry("more", "merge", did(a=2.2, b=3.6)),
)
TWO = (loss_task("a"), loss_task("b"))


def test_shares_ideal_and_mean_are_as_by_hand():
    rows = {row.model: row for row in compare(TWO, ENTRIES, "float32").rows}
    assert list(rows) == ["base", "a", "b", "ideal", "half", "more"]
    assert rows["half"].kept_of["a"].value == pytest.approx(0.5)
    assert rows["more"].kept.value == pytest.approx((0.8 + 0.4) / 2)
    assert rows["ideal"].tasks["a"].value == pytest.approx(2)
    assert rows["ideal"].kept.value == pytest.approx(1)
    assert rows["half"].mean.value == pytest.approx(3)
    assert rows["more"].behind.value == 0
    assert rows["half"].behind.value == pytest.approx(0.1)


def test_the_same_examples_are_drawn_for_all_models():
    entries = (*ENTRIES, Entry("again", "merge", did(a=2.2, b=3.6)))
    row = compare(TWO, entries, "float32").rows[-1]
    assert (row.behind.low, row.behind.high) == (0, 0)
    assert row.kept.low < row.kept.value < row.kept.high


def test_an_interval_covers_what_a_formula_says():
    rng = np.random.default_rng(1)
    losses = rng.normal(2, 0.5, 400)
    task = Task("t", "text", tuple(Example("", (str(i),)) for i in range(400)))
    row = compare([task], [Entry("base", "base", {"t": Outcome(losses, np.ones(400))})], "float32").rows[0]
    assert row.tasks["t"].high - row.tasks["t"].low == pytest.approx(2 * 1.96 * losses.std() / 20, rel=0.1)


def test_an_expert_without_a_gain_has_no_share_and_is_told():
    entries = [Entry("base", "base", did(a=2.0, b=4.0)), *ENTRIES[1:]]
    comparison = compare(TWO, entries, "float32")
    assert comparison.rows[-1].kept_of.keys() == {"b"}
    assert comparison.notes == (
        "a: is not better than the base on its own task, so there is no gain that a merge could keep",
    )


# --- merges below the base or below the best expert -----------------------------------------------

REFERENCES = ENTRIES[:3]  # on task a the expert a is the best with a loss of 2, on b the expert b with 3


def answered(name, *right):
    """A task of prompts and answers, and the outcome of a model with these answers right or wrong."""
    task = Task(name, "answer", tuple(Example(f"{name} {i}", ("x",)) for i in range(len(right))))
    return task, {name: Outcome(np.array(right, float), np.ones(len(right)))}


def sentences(tasks, *entries):
    return list(shortfall_lines(compare(tasks, entries, "float32")))


BRACKETS = "in brackets: the 95 % interval of the difference; a difference whose interval holds 0 is not named"


def test_a_merge_below_the_base_and_below_the_best_expert_is_told_in_one_sentence():
    assert sentences(TWO, *REFERENCES, Entry("out", "merge", did(a=3.25, b=2.5))) == [
        "out is below the base on a (loss 0.25 higher [0.25, 0.25]) "
        "and below the best single expert on a (expert a, loss 1.25 higher [1.25, 1.25])",
        BRACKETS,
    ]


def test_a_merge_below_the_best_expert_on_two_tasks_names_both():
    assert sentences(TWO, *REFERENCES, Entry("out", "merge", did(a=2.5, b=3.25))) == [
        "out is below the best single expert on a (expert a, loss 0.5 higher [0.5, 0.5]), "
        "b (expert b, loss 0.25 higher [0.25, 0.25])",
        BRACKETS,
    ]


def test_a_merge_with_fewer_right_answers_is_told_in_points():
    task, base = answered("quiz", *[1] * 80, *[0] * 20)
    _, expert = answered("quiz", *[1] * 90, *[0] * 10)
    _, merged = answered("quiz", *[1] * 30, *[0] * 70)
    (sentence, _) = sentences(
        [task], Entry("base", "base", base), Entry("chat", "expert", expert), Entry("out", "merge", merged)
    )
    assert sentence == (
        "out is below the base on quiz (accuracy 50 points lower [40, 60]) "
        "and below the best single expert on quiz (expert chat, accuracy 60 points lower [51, 69])"
    )


@pytest.mark.parametrize(
    ("reason", "entries"),
    [
        ("the merge is the best", (*REFERENCES, Entry("out", "merge", did(a=1.5, b=2.5)))),
        ("it is like the best", (*REFERENCES, Entry("out", "merge", did(a=2.0, b=3.0)))),
        ("there are no experts beside it", (REFERENCES[0], Entry("out", "merge", did(a=2.5, b=3.5)))),
        ("there is no merge", REFERENCES),
    ],
)
def test_nothing_is_said_where_no_merge_is_below(reason, entries):
    assert sentences(TWO, *entries) == [], reason


def test_a_difference_that_the_choice_of_examples_may_explain_is_not_named():
    losses = np.array([-0.3, 0.1, -0.2, 0.5])  # above those of the expert by 0.025 in the mean
    outcomes = {"a": Outcome(10 * (2.0 + losses), np.full(4, 10.0)), **did(b=2.5)}
    assert sentences(TWO, *REFERENCES, Entry("out", "merge", outcomes)) == []


def test_the_json_of_a_comparison_has_what_a_merge_is_below():
    comparison = compare(TWO, (*REFERENCES, Entry("out", "merge", did(a=3.25, b=2.5))), "float32")
    content = json.loads(json.dumps(comparison.as_json()))
    jsonschema.validate(content, json_schema())
    rows = {row["model"]: row["below"] for row in content["rows"]}
    assert {model: below for model, below in rows.items() if model != "out"} == {m: [] for m in rows if m != "out"}
    assert [(below["task"], below["kind"], below["model"]) for below in rows["out"]] == [
        ("a", "base", "base"),
        ("a", "expert", "a"),
    ]
    assert rows["out"][0]["difference"]["value"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "value"), [("kept", 0.6), ("worst", 0.4), ("loss", -2.9), ("mean", -2.9), ("a", -2.2)]
)
def test_an_objective_is_the_higher_the_better(name, value):
    assert objective(name, TWO, ENTRIES) == pytest.approx(value)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(demo_folder, tmp_path):  # noqa: F811
    return file_of(tmp_path / "recipe.yaml", text_of(demo_folder))


def test_a_recipe_and_its_finished_merge_are_judged_alike(merger, recipe_file):
    assert merger("run", recipe_file, "-q").code == 0
    ran = merger("eval", recipe_file, recipe_file.parent / "merged", "--json", "-q")
    assert (ran.code, ran.err) == (0, "")

    content = json.loads(ran.out)

    jsonschema.validate(content, json_schema())
    rows = {row["model"]: row for row in content["rows"]}
    assert list(rows) == ["base", *TASKS, "ideal", "recipe", "merged"]
    assert rows["merged"]["tasks"] == rows["recipe"]["tasks"]
    assert rows["upper"]["tasks"]["upper"]["value"] == 1
    assert content["tasks"]["upper"]["measure"] == "accuracy"


def test_the_command_ends_in_what_a_merge_is_below(merger, recipe_file, demo_folder):  # noqa: F811
    expert_copy = ("--set", "rules=[{tensors: ., use: shift}]", "--set", "evaluation.samples=40")
    base_in_upper = ("--set", f"base={demo_folder}/models/upper")
    ran = merger("eval", recipe_file, *base_in_upper, *expert_copy, "-q")
    assert (ran.code, ran.err) == (0, "")
    assert re.fullmatch(
        r"recipe is below the base on upper \(accuracy [\d.]+ points lower \[[\d.]+, [\d.]+\]\) "
        r"and below the best single expert on upper \(expert upper, accuracy .*\), double \(expert double, .*\)",
        ran.out.splitlines()[-2],
    )
    assert ran.out.splitlines()[-1] == BRACKETS


def test_a_finished_merge_alone_names_its_base_and_experts(merger, recipe_file, demo_folder):  # noqa: F811
    merger("run", recipe_file, "-q")
    data = [f"--data={task}={demo_folder}/data/{task}.texts.jsonl" for task in TASKS]
    moved = ("--inputs", demo_folder / "models")  # a manifest keeps no absolute path
    ran = merger("eval", recipe_file.parent / "merged", *data, "--samples", 5, *moved)
    assert ran.code == 0
    assert "expert double" in ran.out
    assert "5 of upper" in ran.out
    assert "perplexity" in ran.out


def test_what_cannot_be_judged_is_told_in_a_line(merger, recipe_file, demo_folder, tmp_path):  # noqa: F811
    cases = {
        ("--set", "evaluation=null"): "there is nothing to judge by",
        ("--data", f"{demo_folder}/data/upper.jsonl", "--data", f"upper={demo_folder}"): "expected TASK=FILE",
        ("--data", f"{demo_folder}/data/upper.jsonl"): "are calibration text too",
        ("--plot", f"{tmp_path}/nowhere/x.png"): "expected a file in a folder that is there",
        ("--set", "evaluation.smaples=3"): "did you mean 'samples'?",
    }
    for arguments, message in cases.items():
        ran = merger("eval", recipe_file, *arguments, "-q")
        assert (ran.code, message in ran.err) == (2, True), ran.err
    ran = merger("eval", demo_folder / "models" / "base", "-q")
    assert "give the recipe too, which names base and experts" in ran.err


def test_recipes_of_other_experts_are_judged_apart(demo_folder):  # noqa: F811
    recipe = recipe_of(demo_folder)
    other_recipe = recipe_of(
        demo_folder, experts={"upper": text_of(demo_folder)["experts"]["upper"]}, method="linear", calibration=None
    )
    with pytest.raises(RecipeError, match="other: has another base or other experts than one"):
        evaluate({"one": recipe, "other": other_recipe})


def test_what_judges_a_merge_decides_no_byte_of_it(demo_folder):  # noqa: F811
    evaluated_recipe, plain_recipe = recipe_of(demo_folder), recipe_of(demo_folder, evaluation=None)
    assert evaluated_recipe.spelled_out() == plain_recipe.spelled_out()
    assert yaml.safe_load(yaml.safe_dump(evaluated_recipe.spelled_out())).keys().isdisjoint({"evaluation", "search"})
