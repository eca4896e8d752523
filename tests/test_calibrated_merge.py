"""Merges that look at layer inputs, from text to checkpoint, on the demo's trained models."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import load
from safetensors.torch import save_file
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import merger
from merger.calibration import Settings, batches, collect_all
from merger.calibration import samples as texts
from merger.calibration import statistics_files as files
from merger.checkpoint.opening import open_checkpoint
from merger.checkpoint.writer import Writer
from merger.demo import tasks as demo_tasks
from merger.engine.memory import slice_rows
from merger.errors import CheckpointError, RecipeError
from merger.outputs.verify import DeepCheck

MODELS = Path(merger.__file__).parent / "demo" / "models"
EXPERTS = ("upper", "shift", "double")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the models and some text, and a cache of its own."""
    monkeypatch.setenv("MERGER_CACHE", str(tmp_path / "cache"))
    shutil.copytree(MODELS, tmp_path / "models")
    for task in EXPERTS:
        lines = (json.dumps({"text": p + a}) for p, a in demo_tasks.examples(task, "calibration", 12))
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
    return tmp_path


def recipe(place, method="obim", *, output="out", dtype="bfloat16", shard_size=10**9, **options):
    calibration = {"data": {task: f"{task}.jsonl" for task in EXPERTS}, "samples": 12}
    content = {
        "base": "models/base",
        "experts": {task: f"models/{task}" for task in EXPERTS},
        **({} if "pipeline" in options else {"method": method}),
        "calibration": calibration,
        "output": {"path": output, "dtype": dtype, "shard_size": shard_size},
        **options,
    }
    return merger.Recipe.parse(content, folder=place)


def weights(place, output="out"):
    return (place / output / "model.safetensors").read_bytes()


def forbid_forward_passes(monkeypatch):
    def collect(*_, **__):
        raise AssertionError("a forward pass was made")

    monkeypatch.setattr("merger.calibration.statistics.collect", collect)


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_are_made_once_and_found_again_to_the_same_bytes(place, monkeypatch):
    merger.merge(recipe(place))
    forbid_forward_passes(monkeypatch)
    merger.merge(recipe(place, output="again"))
    assert weights(place, "again") == weights(place)


def sources(*counts):
    """Calibration data: so many samples of each expert's text, some of another's beside its own."""
    files = [{"file": f"{task}.jsonl", "samples": count} for task, count in zip(EXPERTS, counts, strict=True)]
    return {"data": dict.fromkeys(EXPERTS, files), "max_tokens": 64}


def test_several_sources_of_text_are_calibrated_together_and_kept_under_their_counts(place):
    merger.merge(recipe(place, calibration=sources(2, 3, 4)))
    files = set((place / "cache").glob("*.safetensors"))
    merger.merge(recipe(place, output="same", calibration=sources(2, 3, 4)))
    assert set((place / "cache").glob("*.safetensors")) == files
    assert weights(place, "same") == weights(place)

    merger.merge(recipe(place, output="other", calibration=sources(2, 4, 3)))
    assert len(set((place / "cache").glob("*.safetensors")) - files) == 3
    assert weights(place, "other") != weights(place)


def test_a_source_alone_gives_the_bytes_of_a_plain_file(place):
    merger.merge(recipe(place))
    data = {task: {"file": f"{task}.jsonl", "samples": 12} for task in EXPERTS}
    merger.merge(recipe(place, output="one", calibration={"data": data}))
    assert weights(place, "one") == weights(place)


def test_the_manifest_names_every_source_by_its_hash(place):
    merger.merge(recipe(place, calibration=sources(2, 3, 4)))
    record = json.loads((place / "out/merger.json").read_text())
    assert {f"{task}.jsonl" for task in EXPERTS} <= record["calibration"].keys()
    assert record["recipe"]["calibration"]["data"]["upper"][1] == {"file": "shift.jsonl", "samples": 3, "fields": {}}


def test_statistics_are_made_again_for_weights_with_another_activation(place):
    merger.merge(recipe(place))
    names_before = {path.name for path in (place / "cache").glob("*.stats.safetensors")}
    config = place / "models" / "upper" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_bytes()), "hidden_act": "gelu"}))
    merger.merge(recipe(place, output="again"))
    new_names = {path.name for path in (place / "cache").glob("*.stats.safetensors")} - names_before
    assert len(new_names) == 1
    assert weights(place, "again") != weights(place)


def test_a_statistics_file_is_refused_for_weights_with_another_activation(place):
    files = merger.calibrate(recipe(place), to=place / "stats")
    config = place / "models" / "upper" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_bytes()), "hidden_act": "gelu"}))
    stats = {name: f"stats/{path.name}" for name, path in files.items()}
    with pytest.raises(CheckpointError, match=r"was made for another model \(weights or config.json\)"):
        merger.merge(recipe(place, calibration={"stats": stats}))


def test_the_manifest_names_the_scores_that_depend_on_where_text_went_through(place):
    merger.merge(recipe(place))
    assert manifest(place)["device-dependent"] == ["obm"]
    assert manifest(place)["versions"]["transformers"] == transformers.__version__


def test_the_manifest_names_no_score_where_files_hold_the_statistics(place):
    files = merger.calibrate(recipe(place), to=place / "stats")
    merger.merge(recipe(place, calibration={"stats": {name: f"stats/{path.name}" for name, path in files.items()}}))
    assert manifest(place)["device-dependent"] == []
    assert "transformers" not in manifest(place)["versions"]


def manifest(place):
    return json.loads((place / "out" / "merger.json").read_bytes())


def test_with_statistics_files_a_merge_needs_no_text_and_no_forward_pass(place, monkeypatch):
    merger.merge(recipe(place))
    files = merger.calibrate(recipe(place), to=place / "stats")
    shutil.rmtree(place / "cache")
    for task in EXPERTS:
        (place / f"{task}.jsonl").unlink()
    forbid_forward_passes(monkeypatch)
    stats = {name: f"stats/{path.name}" for name, path in files.items()}
    merger.merge(recipe(place, output="again", calibration={"stats": stats}))
    assert weights(place, "again") == weights(place)


def test_every_position_of_an_obim_merge_is_one_experts_or_the_bases(place):
    merger.merge(recipe(place))
    merged, base = load(place / "out"), load(MODELS / "base")
    experts = [load(MODELS / task) for task in EXPERTS]
    for name, value in merged.items():
        sources = torch.stack([base[name], *(expert[name] for expert in experts)])
        assert (value == sources).any(0).all(), name


def test_statistics_of_another_model_are_refused_before_anything_is_written(place):
    merger.calibrate(recipe(place), to=place / "stats")
    stats = {task: f"stats/{expert}.stats.safetensors" for task, expert in zip(EXPERTS, EXPERTS[::-1], strict=True)}
    with pytest.raises(CheckpointError, match="was made for another model"):
        merger.merge(recipe(place, calibration={"stats": stats}))
    assert not list(place.glob("out*"))


def test_activations_that_are_not_numbers_are_an_error_before_anything_is_written(place):
    from safetensors.torch import load_file, save_file

    file = place / "models" / "shift" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"shift: what enters model\.layers\.\S+ is not finite"):
        merger.merge(recipe(place))
    assert not list(place.glob("out*"))


def test_text_is_split_by_the_experts_tokenizer_whatever_the_output_gets(place):
    """Two letters of one expert trade their ids, in its tokenizer and in its table: the merge stays what it was."""
    merger.merge(recipe(place, output="before"))
    file = place / "models" / "shift" / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    a, b = vocabulary["a"], vocabulary["b"]
    vocabulary["a"], vocabulary["b"] = b, a
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="the models' tokenizers give one id to different tokens"):
        merger.merge(recipe(place))
    table = load(place / "models" / "shift")
    table["model.embed_tokens.weight"][[a, b]] = table["model.embed_tokens.weight"][[b, a]]
    save_file(table, place / "models" / "shift" / "model.safetensors", {"format": "pt"})
    content = {**recipe(place).spelled_out(), "output": {"path": "out", "tokenizer": "base"}}
    merger.merge(merger.Recipe.parse(content, folder=place))
    rows, before = (load(place / folder)["model.embed_tokens.weight"][[a, b]] for folder in ("out", "before"))
    torch.testing.assert_close(rows, before)


# --- Gram matrices --------------------------------------------------------------------------------


def samples_of(place, task):
    tokenizer = texts.load_tokenizer(place / "models" / task, task, trust_remote_code=False)
    return texts.load_samples(f"{task}.jsonl", place, tokenizer, Settings(samples=12))


def moments_of(place, task):
    """What enters an expert's matrices, all blocks at once."""
    with open_checkpoint(str(place / "models" / task), None, label=task, folder=place) as model:
        return collect_all(model, batches(samples_of(place, task).tokens), Settings(samples=12), gram=True)


def test_regmean_block_by_block_is_the_regression_over_whole_models(place):
    merger.merge(recipe(place, "regmean", parameters={"alpha": 0.7}, dtype="float32"))
    merged, base = load(place / "out"), load(MODELS / "base")
    experts, moments = [load(MODELS / task) for task in EXPERTS], [moments_of(place, task) for task in EXPERTS]
    matrices = [name for name in base if ".mlp." in name or "_proj" in name or "embed" in name]
    assert len(matrices) == 3 * 7 + 1  # the embedding is the head too
    for name, value in base.items():
        deltas = [expert[name].double() - value.double() for expert in experts]
        expected = sum(deltas) / 3
        if name in matrices:
            grams = [by_name[name].gram.double() for by_name in moments]
            grams = [0.7 * gram + 0.3 * gram.diagonal().diag() for gram in grams]
            solved = torch.linalg.solve(sum(grams), sum(g @ d.T for g, d in zip(grams, deltas, strict=True)))
            expected = solved.T
        error = (merged[name].double() - value.double() - expected).norm() / expected.norm()
        assert error < 1e-5, name


def block_of(name):
    """The number of the block that a tensor is in; -1 outside."""
    return int(name.split(".")[2]) if ".layers." in name else -1


TABLE = "model.embed_tokens.weight"  # which is the head too
BLOCKS = (0, 1, 2, -1)


def rows_entering(model, batch, block):
    """The inputs of a block's matrices, or the head's (-1), for a batch without padding, when the whole model runs."""
    rows = {}

    def keep_rows(name, _, arguments):
        rows[name] = arguments[0][batch.mask].double()

    hooks = [
        module.register_forward_pre_hook(functools.partial(keep_rows, TABLE if name == "lm_head" else f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and block_of(f"{name}.weight") == block
    ]
    with torch.no_grad():
        model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return rows


def grams_behind(place, task, weights, block):
    """E[x x^T] of the inputs of a block's matrices, for an expert's text and a model of these weights: run whole."""
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "models" / task, dtype=torch.float32).eval()
    model.load_state_dict(weights, strict=False)
    sums = {}
    for batch in batches(samples_of(place, task).tokens):
        for name, rows in rows_entering(model, batch, block).items():
            total, count = sums.get(name, (0, 0))
            sums[name] = total + rows.T @ rows, count + len(rows)
    return {name: total / count for name, (total, count) in sums.items()}


def regmean_behind_merged_blocks(place, alpha):
    """RegMean++ as it is written, on whole models: each expert's block behind all that is merged by then."""
    base = {name: value.double() for name, value in load(MODELS / "base").items()}
    experts = [{name: value.double() for name, value in load(MODELS / task).items()} for task in EXPERTS]
    merged = {name: sum(expert[name] for expert in experts) / 3 for name in base}
    for block in BLOCKS:
        grams = []
        for task, expert_weights in zip(EXPERTS, experts, strict=True):
            own_names = {name for name in base if block_of(name) == block != -1}
            weights = {name: (expert_weights if name in own_names else merged)[name].float() for name in base}
            grams.append(grams_behind(place, task, weights, block))
        for name in grams[0]:
            shrunk_grams = [alpha * gram[name] + (1 - alpha) * gram[name].diagonal().diag() for gram in grams]
            weighted_deltas = sum(
                g @ (expert_weights[name] - base[name]).T
                for g, expert_weights in zip(shrunk_grams, experts, strict=True)
            )
            merged[name] = base[name] + torch.linalg.solve(sum(shrunk_grams), weighted_deltas).T
    return merged


def test_regmean_behind_merged_blocks_is_that_of_whole_models(place):
    """Streamed, a block's Gram matrices are made from hidden states that went through the merged blocks on file."""
    merger.merge(recipe(place, "regmean", parameters={"alpha": 0.7, "inputs": "merged"}, dtype="float32"))
    merged, base = load(place / "out"), load(MODELS / "base")
    for name, expected in regmean_behind_merged_blocks(place, 0.7).items():
        change = expected - base[name].double()
        assert (merged[name].double() - expected).norm() / change.norm() < 1e-5, name


def regression_towards_experts_features(place, target, ridge):
    """FeatCal on the mean as it is written, on whole models: a block's mean behind all that is merged by then."""
    base = {name: value.double() for name, value in load(MODELS / "base").items()}
    experts = [{name: value.double() for name, value in load(MODELS / task).items()} for task in EXPERTS]
    mean = {name: sum(expert[name] for expert in experts) / 3 for name in base}
    merged = dict(mean)
    student, *teachers = (
        transformers.AutoModelForCausalLM.from_pretrained(place / "models" / name, dtype=torch.float32).eval()
        for name in ("base", *EXPERTS)
    )
    for block in BLOCKS:
        student.load_state_dict({name: value.float() for name, value in merged.items()}, strict=False)
        left, right = {}, {}
        for task, expert, teacher in zip(EXPERTS, experts, teachers, strict=True):
            gram, product = {}, {}
            for batch in batches(samples_of(place, task).tokens):
                targets = rows_entering(teacher, batch, block)
                for name, x in rows_entering(student, batch, block).items():
                    y = x if name == TABLE else target * targets[name] + (1 - target) * x
                    gram[name] = gram.get(name, 0) + x.T @ x
                    product[name] = product.get(name, 0) + expert[name] @ y.T @ x
            for name in gram:
                left[name] = left.get(name, 0) + gram[name] / gram[name].norm()
                right[name] = right.get(name, 0) + product[name] / gram[name].norm()
        for name in left:
            size = len(left[name])
            total = left[name] + ridge * torch.eye(size, dtype=torch.float64)
            merged[name] = torch.linalg.solve(total, (right[name] + ridge * mean[name]).T).T
    return merged


DRAFT = {"inputs": "draft", "target": 0.5, "alpha": 1, "normalize": "frobenius", "ridge": 0.05}


def test_regression_towards_the_experts_features_is_that_of_whole_models(place):
    merger.merge(recipe(place, "regmean", parameters=DRAFT, dtype="float32"))
    merged, base = load(place / "out"), load(MODELS / "base")
    for name, expected in regression_towards_experts_features(place, 0.5, 0.05).items():
        change = expected - base[name].double()
        assert (merged[name].double() - expected).norm() / change.norm() < 1e-4, name


@pytest.mark.parametrize("method", ["regmean", "featcal", "wudi_svc"])
def test_a_head_that_is_merged_in_runs_of_its_rows_has_the_values_of_one_merged_whole(place, monkeypatch, method):
    for seed, name in enumerate(["base", *EXPERTS]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=58, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
        )
        LlamaForCausalLM(config).save_pretrained(place / "models" / name)
    for output, elements in (("whole", 1 << 19), ("runs", 2)):
        monkeypatch.setattr("merger.engine.memory.SLICE", elements)
        merger.merge(recipe(place, method, output=output, dtype="float32"))
    head = next(tensor for tensor in merger.plan(recipe(place, method)).tensors if tensor.kind == "head")
    assert slice_rows(head, head.parts[0]) == 8  # of 58
    whole, runs = load(place / "whole"), load(place / "runs")
    assert whole.keys() == runs.keys()
    for name, values in whole.items():
        torch.testing.assert_close(runs[name], values, rtol=1e-5, atol=1e-5)


def test_a_target_without_a_draft_is_refused(place):
    with pytest.raises(RecipeError, match=r"target: needs .* write inputs: draft"):
        recipe(place, "regmean", parameters={"target": 0.25})


def test_merged_inputs_are_other_inputs_than_own_ones(place):
    for inputs in ("own", "merged"):
        merger.merge(recipe(place, "regmean", output=inputs, parameters={"inputs": inputs}, dtype="float32"))
    separate, merged = load(place / "own"), load(place / "merged")
    changed_names = {
        name for name in separate if not torch.allclose(separate[name], merged[name], rtol=1e-3, atol=1e-6)
    }
    assert {block_of(name) for name in changed_names} >= {1, 2}


@pytest.mark.parametrize(
    ("method", "parameters"), [("regmean", {"inputs": "merged"}), ("regmean", DRAFT), ("distill", {"steps": 2})]
)
def test_a_merge_behind_merged_blocks_goes_on_where_it_was_killed_and_verifies(place, monkeypatch, method, parameters):
    """What earlier blocks became is read back from the output, whichever run wrote it."""
    merged_inputs = {"parameters": parameters}
    finish_tensor = Writer.finish_tensor

    def stop(self, name, notes=()):
        if block_of(name) == 2 and "proj" in name:
            raise KeyboardInterrupt
        finish_tensor(self, name, notes)

    monkeypatch.setattr(Writer, "finish_tensor", stop)
    with pytest.raises(KeyboardInterrupt):
        merger.merge(recipe(place, method, shard_size=20_000, **merged_inputs))
    monkeypatch.setattr(Writer, "finish_tensor", finish_tensor)
    messages = []
    merger.merge(recipe(place, method, shard_size=20_000, **merged_inputs), merger.RunOptions(notice=messages.append))
    assert any("goes on where an earlier run stopped" in line for line in messages)
    merger.merge(recipe(place, method, output="whole", **merged_inputs))
    resumed, uninterrupted = load(place / "out"), load(place / "whole")
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())
    assert merger.verify(place / "whole", deep=DeepCheck(sample=6)).differences == ()


def test_own_and_merged_inputs_do_not_go_together(place):
    rules = [{"tensors": "mlp", "method": "regmean", "parameters": {"inputs": "merged"}}]
    with pytest.raises(RecipeError, match="inputs: own in one method and merged in another"):
        recipe(place, "regmean", rules=rules)


def text_lines(ran):
    assert ran.code == 0
    return [line for line in ran.out.splitlines() if line.startswith(("text of", "calibration"))]


def test_a_plan_tells_of_each_text_its_tokens_and_whether_statistics_are_there(merger, place, monkeypatch):
    monkeypatch.setattr("merger.checkpoint.hashes.SETTLED", -1)  # hashes of files this new are not kept otherwise
    path = place / "recipe.yaml"
    path.write_text(json.dumps(recipe(place).spelled_out()))
    cost = "calibration runs 806 tokens in all, each text through its own model"
    lines = [
        "text of upper: upper.jsonl: 12 samples, 250 tokens; statistics {}",
        "text of shift: shift.jsonl: 12 samples, 238 tokens; statistics {}",
        "text of double: double.jsonl: 12 samples, 318 tokens; statistics {}",
    ]
    before, during = ([line.format(f"made {time} the merge") for line in lines] for time in ("before", "during"))
    assert text_lines(merger("plan", path)) == [*before, cost]
    assert text_lines(merger("plan", path, "--set", "method=featcal", "--set", "parameters={}")) == [*during, cost]
    assert merger("calibrate", path).code == 0
    assert text_lines(merger("plan", path)) == [line.format("in the cache") for line in lines]
    assert text_lines(merger("plan", path, "--set", "method=fisher", "--set", "parameters={}")) == [*before, cost]
    assert text_lines(merger("plan", path, "--set", "method=linear", "--set", "parameters={}")) == []


def test_a_plan_tells_the_faults_of_all_texts(merger, place):
    path = place / "recipe.yaml"
    path.write_text(json.dumps(recipe(place).spelled_out()))
    (place / "upper.jsonl").write_text('{"txt": "a"}')
    (place / "double.jsonl").write_text('{"text": ""}')
    ran = merger("plan", path)
    assert (ran.code, ran.err.splitlines()) == (
        3,
        [
            f"error: {place}/upper.jsonl:1: needs a field messages, prompt or text; found txt",
            "error: double.jsonl: has no text; all its records are empty",
        ],
    )


def one_block_called_twice(place):
    """Models of the recipe's names whose blocks share all weights, with the demo's tokenizer."""
    config = AlbertConfig(
        vocab_size=58, embedding_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=16,
        num_hidden_layers=2, architectures=["AlbertForMaskedLM"],
    )  # fmt: skip
    for seed, name in enumerate(("base", *EXPERTS)):
        torch.manual_seed(seed)
        AlbertForMaskedLM(config).save_pretrained(place / "models" / name)


@pytest.mark.parametrize(
    ("method", "parameters", "remedy"),
    [
        ("regmean", {"inputs": "merged"}, "give regmean the parameter inputs: own"),
        ("regmean", {"inputs": "draft", "target": 0.5}, "give regmean the parameter inputs: own"),
        ("featcal", {}, "take the method regmean in place of featcal"),
        ("distill", {"anchor": "ties"}, "take the method regmean in place of distill"),
    ],
)
def test_a_model_without_separate_blocks_is_told_what_to_write_in_place_of_the_method(
    place, method, parameters, remedy
):
    one_block_called_twice(place)
    with pytest.raises(CheckpointError) as refusal:
        merger.merge(recipe(place, method, parameters=parameters))
    assert str(refusal.value) == (
        "upper: its blocks cannot be run one at a time (its blocks do not follow one another), so none can be merged "
        f"before the next one runs, as {method} needs it; {remedy}"
    )


def test_what_a_model_without_separate_blocks_is_told_to_take_merges_it(place):
    one_block_called_twice(place)
    assert merger.merge(recipe(place, "regmean")).tensors["merged"] > 0


@pytest.mark.parametrize(("method", "parameters"), [("regmean", {"inputs": "merged"}), ("featcal", {})])
def test_before_anything_is_merged_an_inspection_shows_the_task_vectors_alone_and_says_so(place, method, parameters):
    rules = [{"tensors": "norm", "use": "base"}, {"tensors": "mlp", "method": "ties"}]
    inspection = merger.inspect(recipe(place, method, parameters=parameters, rules=rules))
    plain = merger.inspect(recipe(place, "linear", rules=rules[:1]))
    assert inspection.view("task_vectors") == plain.view("task_vectors")
    assert [view.name for view in inspection.views] == ["task_vectors"]
    assert inspection.notes[0] == (
        "its stages look at blocks behind the merged ones, so this shows the task vectors before them; "
        "`merger run` it, and inspect the output for what became of them"
    )


# --- learning -------------------------------------------------------------------------------------


def with_blocks(weights, models):
    """A whole model of these weights, whose blocks' outputs are kept as it runs: the model and the list."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODELS / "base", dtype=torch.float32).eval()
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    models.append(model)
    outputs = []
    for block in model.model.layers:
        block.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    return model, outputs


def distilled(place, start, steps, rate):
    """The learned model as it is written, on whole models: a block's parameters behind all that is learned by then."""
    models = []
    student, answers = with_blocks(start, models)
    teachers = [with_blocks(load(MODELS / task), models) for task in EXPERTS]
    texts_by_expert = [batches(samples_of(place, task).tokens, 1024) for task in EXPERTS]
    for parameter in (parameter for model in models for parameter in model.parameters()):
        parameter.requires_grad_(False)
    for block, layer in enumerate(student.model.layers):
        parameters = [parameter.requires_grad_(True) for parameter in layer.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=rate)
        for step in range(steps):
            optimizer.zero_grad()
            for text, (teacher, targets) in zip(texts_by_expert, teachers, strict=True):
                batch = text[step % len(text)]
                for model, outputs in ((teacher, targets), (student, answers)):
                    outputs.clear()
                    model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
                answer, target = answers[block][batch.mask], targets[block][batch.mask]
                ((answer - target).square().sum() / target.square().sum()).backward()
            optimizer.step()
        for parameter in parameters:
            parameter.requires_grad_(False)
    return student.state_dict()


LEARNED = {"steps": 3, "rate": 1e-3, "anchor": "mean"}


def test_learning_block_by_block_is_that_on_whole_models(place):
    merger.merge(recipe(place, "distill", parameters=LEARNED, dtype="float32"))
    merger.merge(recipe(place, "mean", output="mean", dtype="float32"))
    merged, start = load(place / "out"), load(place / "mean")
    expected = distilled(place, start, 3, 1e-3)
    for name, values in merged.items():
        learned = expected[name] - start[name]
        if ".layers." in name:
            assert learned.abs().max() > 1e-3, name
        assert (values - expected[name]).norm() <= 1e-4 * learned.norm(), name


def test_learning_is_in_float32_where_models_run_in_another_dtype(place, monkeypatch):
    merger.merge(recipe(place, "distill", parameters=LEARNED, dtype="float32"))
    monkeypatch.setattr("merger.calibration.observed_model.default_dtype", lambda *_: torch.bfloat16)  # as on a GPU
    merger.merge(recipe(place, "distill", output="again", parameters=LEARNED, dtype="float32"))
    assert weights(place) == weights(place, "again")


def test_learning_may_start_from_a_regression_of_the_same_block(place):
    parameters = {"anchor": "featcal", "steps": 1, "rate": "1/100000000"}
    merger.merge(recipe(place, "distill", parameters=parameters, dtype="float32"))
    merger.merge(recipe(place, "featcal", output="start", dtype="float32"))
    learned, start = load(place / "out"), load(place / "start")
    for name, values in learned.items():
        torch.testing.assert_close(values, start[name], rtol=0, atol=2e-6)


def test_experts_that_transformers_packs_stay_at_the_anchor_and_a_note_says_so(place):
    for seed, name in enumerate(["base", *EXPERTS]):
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=58, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        )  # fmt: skip
        MixtralForCausalLM(config).save_pretrained(place / "models" / name)
    result = merger.merge(recipe(place, "distill", parameters=LEARNED, dtype="float32"))
    merger.merge(recipe(place, "mean", output="mean", dtype="float32"))
    learned, anchor = load(place / "out"), load(place / "mean")
    changed_names = {name for name, values in learned.items() if not torch.equal(values, anchor[name])}
    norms = {"input_layernorm", "post_attention_layernorm"}
    assert {name.split(".")[3] for name in changed_names} == {"self_attn", "block_sparse_moe", *norms}
    assert not any("experts" in name for name in changed_names)
    note = (
        "some layers of model.layers: transformers does not compute with them as they are stored; they are not learned"
    )
    assert result.notes.count(note) == 1


def test_learning_may_follow_any_pipeline(place):
    stages = [{"mean": {}}, {"learn": {"steps": 3, "rate": 1e-3}}]
    merger.merge(recipe(place, "distill", parameters=LEARNED, dtype="float32"))
    merger.merge(recipe(place, output="stages", dtype="float32", pipeline=stages))
    assert weights(place) == weights(place, "stages")


def test_biases_and_matrices_that_are_stored_transposed_learn_too(place):
    for seed, name in enumerate(["base", *EXPERTS]):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=58, n_positions=64, n_embd=8, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(place / "models" / name)
    merger.merge(recipe(place, "distill", parameters=LEARNED, dtype="float32"))
    merger.merge(recipe(place, "mean", output="mean", dtype="float32"))
    learned, anchor = load(place / "out"), load(place / "mean")
    largest = {name: float((values - anchor[name]).abs().max()) for name, values in learned.items()}
    assert all(0.001 < change < 0.0031 for name, change in largest.items() if ".h." in name)
    assert all(change == 0 for name, change in largest.items() if ".h." not in name)


COEFFICIENTS = {"steps": 2, "rate": 0.02, "start": 0.25}


def with_coefficients(place, per, steps, rate, start):
    """The model of learned coefficients as it is written, on whole models and by autograd through their sums."""
    models = []
    base = load(MODELS / "base")
    student, answers = with_blocks({name: values.float() for name, values in base.items()}, models)
    experts = {task: load(MODELS / task) for task in EXPERTS}
    teachers = [with_blocks(weights, models) for weights in experts.values()]
    texts_by_expert = [batches(samples_of(place, task).tokens, 1024) for task in EXPERTS]
    deltas = {n: torch.stack([e[n].float() - base[n].float() for e in experts.values()]) for n in base}
    weights = {n: base[n].float() + start * deltas[n].sum(0) for n in base}
    for block in range(len(student.model.layers)):
        names = [name for name in base if name.startswith(f"model.layers.{block}.")]
        coefficients = {n: torch.full(coefficient_shape(deltas[n], per), start, requires_grad=True) for n in names}
        optimizer = torch.optim.Adam(coefficients.values(), lr=rate)
        for step in range(steps):
            optimizer.zero_grad()
            for text, (teacher, targets) in zip(texts_by_expert, teachers, strict=True):
                batch = text[step % len(text)]
                inputs = {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "use_cache": False}
                learned = {n: base[n].float() + (coefficients[n] * deltas[n]).sum(0) for n in names}
                outputs = []
                for model, found in ((teacher, targets), (student, answers)):
                    found.clear()
                    torch.func.functional_call(model, {} if model is teacher else weights | learned, (), inputs)
                    outputs.append(found[block][batch.mask])
                ((outputs[1] - outputs[0].detach()).square().sum() / outputs[0].detach().square().sum()).backward()
            optimizer.step()
        with torch.no_grad():
            weights |= {n: base[n].float() + (coefficients[n] * deltas[n]).sum(0) for n in names}
    return weights


def coefficient_shape(deltas, per):
    ones = {"element": 0, "row": 1, "matrix": deltas.dim() - 1}[per] if deltas.dim() > 2 else int(per != "element")
    return (*deltas.shape[: deltas.dim() - ones], *[1] * ones)


@pytest.mark.parametrize("per", ["element", "row", "matrix"])
def test_coefficients_are_learned_block_by_block_as_on_whole_models(place, per):
    merger.merge(recipe(place, "prodistill", parameters={**COEFFICIENTS, "per": per}, dtype="float32"))
    expected, start = with_coefficients(place, per, 2, 0.02, 0.25), with_coefficients(place, per, 0, 0.02, 0.25)
    for name, values in load(place / "out").items():
        learned = expected[name] - start[name]
        if ".layers." in name:
            assert learned.norm() > 1e-3, name
        assert (values - expected[name]).norm() <= 1e-4 * learned.norm() + 1e-6, name


def test_coefficients_of_matrices_that_are_stored_transposed_are_those_of_output_neurons(place):
    for seed, name in enumerate(["base", *EXPERTS]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=58, n_positions=64, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(place / "models" / name)
    merger.merge(recipe(place, "prodistill", parameters={**COEFFICIENTS, "per": "row"}, dtype="float32"))
    base, merged = load(place / "models" / "base"), load(place / "out")
    experts = [load(place / "models" / task) for task in EXPERTS]
    name = "transformer.h.0.mlp.c_fc.weight"  # [in, out]
    changes = torch.stack([expert[name] - base[name] for expert in experts])
    for neuron in range(changes.shape[2]):  # three coefficients explain the weights of a neuron
        solution = torch.linalg.lstsq(changes[:, :, neuron].T, (merged[name] - base[name])[:, neuron, None]).solution
        assert torch.allclose(
            changes[:, :, neuron].T @ solution, (merged[name] - base[name])[:, neuron, None], atol=1e-6
        )
        assert (solution - 0.25).abs().max() > 0.01


def test_an_expert_of_weight_zero_teaches_nothing(place):
    weights = {"upper": 1, "shift": 0, "double": 0}
    merger.merge(recipe(place, "distill", parameters={**LEARNED, "weight": weights}, dtype="float32"))
    (place / "shift.jsonl").write_text(json.dumps({"text": "another text"}))
    merger.merge(recipe(place, "distill", output="again", parameters={**LEARNED, "weight": weights}, dtype="float32"))
    assert load(place / "out").keys() == load(place / "again").keys()
    for name, values in load(place / "out").items():
        assert torch.equal(values, load(place / "again")[name]), name


def test_a_rate_that_lets_the_loss_go_out_of_bounds_is_told(place):
    with pytest.raises(CheckpointError, match=r"the loss of a block is no number at step \d+; lower rate"):
        merger.merge(recipe(place, "distill", parameters={"steps": 40, "rate": 1e20}))
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rate": 0}, "rate is 0, but steps of no length learn nothing"),
        ({"weight": 0}, "weight: an expert cannot count less than nothing, nor all of them nothing"),
        ({"steps": 0}, "parameters.steps: is 0, expected at least 1"),
    ],
)
def test_what_learns_nothing_is_refused(place, parameters, message):
    with pytest.raises(RecipeError) as refused:
        recipe(place, "distill", parameters=parameters)
    assert message in str(refused.value)


# --- Gram matrices that are kept ------------------------------------------------------------------


def kept_grams(place, **options):
    """A recipe that takes the Gram matrices that were kept in `stats`."""
    merger.calibrate(recipe(place, "regmean"), to=place / "stats", gram=True)
    return recipe(place, "regmean", calibration={"stats": {t: f"stats/{t}.grams" for t in EXPERTS}}, **options)


def test_with_kept_gram_matrices_a_merge_needs_no_text_and_no_forward_pass(place, monkeypatch):
    merger.merge(recipe(place, "regmean"))
    recipe_with_grams = kept_grams(place, output="again")
    for task in EXPERTS:
        (place / f"{task}.jsonl").unlink()
    forbid_forward_passes(monkeypatch)
    merger.merge(recipe_with_grams)
    assert weights(place, "again") == weights(place)


def test_gram_matrices_that_were_kept_without_a_place_are_found_again(place, monkeypatch):
    merger.merge(recipe(place, "regmean"))
    merger.calibrate(recipe(place, "regmean"), gram=True)
    forbid_forward_passes(monkeypatch)
    merger.merge(recipe(place, "regmean", output="again"))
    assert weights(place, "again") == weights(place)


def test_a_folder_of_gram_matrices_serves_a_saliency_too(place):
    kept_grams(place)
    merger.merge(recipe(place, "obim"))
    stats = {task: f"stats/{task}.grams" for task in EXPERTS}
    merger.merge(recipe(place, "obim", output="again", calibration={"stats": stats}))
    assert weights(place, "again") == weights(place)


def test_a_kept_gram_matrix_is_a_float32_triangle_and_shared_ones_are_there_once(place):
    kept_grams(place)
    tensors, moments = load(place / "stats" / "upper.grams"), moments_of(place, "upper")
    triangles = [name for name in tensors if name.endswith(".gram")]
    assert len(triangles) == 3 * 4 + 1  # of q, k and v one; of o; of gate and up one; of down; and the head's
    name = "model.layers.1.mlp.down_proj.weight"
    rows, columns = torch.triu_indices(*moments[name].gram.shape)
    assert torch.equal(tensors[f"{name}.gram"], moments[name].gram[rows, columns])
    assert tensors[f"{name}.gram"].dtype == torch.float32


def test_a_calibration_that_was_stopped_goes_on_with_the_blocks_that_it_lacks(place, monkeypatch):
    merger.calibrate(recipe(place, "regmean"), to=place / "whole", gram=True)
    save_block, blocks = files.save_block, []

    def stop(folder, number, unit, *arguments):
        blocks.append((folder.name, unit))
        if len(blocks) == 2:
            raise KeyboardInterrupt
        save_block(folder, number, unit, *arguments)

    monkeypatch.setattr(files, "save_block", stop)
    with pytest.raises(KeyboardInterrupt):
        merger.calibrate(recipe(place, "regmean"), to=place / "stats", gram=True)
    stats = {task: f"{'stats' if task == 'upper' else 'whole'}/{task}.grams" for task in EXPERTS}
    with pytest.raises(CheckpointError, match=r"upper\.grams: its Gram matrices are not all there"):
        merger.merge(recipe(place, "regmean", calibration={"stats": stats}))
    merger.calibrate(recipe(place, "regmean"), to=place / "stats", gram=True)
    assert len(blocks) == len(set(blocks)) + 1  # only the one that failed was made twice
    for task in EXPERTS:
        for file in (place / "whole" / f"{task}.grams").iterdir():
            assert (place / "stats" / f"{task}.grams" / file.name).read_bytes() == file.read_bytes()


def test_gram_matrices_of_other_text_are_not_gone_on_with(place):
    kept_grams(place)
    (place / "upper.jsonl").write_text(json.dumps({"text": "abc"}))
    with pytest.raises(CheckpointError, match="was made from another model, data or settings"):
        merger.calibrate(recipe(place, "regmean"), to=place / "stats", gram=True)


def test_statistics_files_hold_no_gram_matrices(place):
    paths = merger.calibrate(recipe(place), to=place / "stats")
    stats = {name: f"stats/{path.name}" for name, path in paths.items()}
    with pytest.raises(CheckpointError, match="has no Gram matrices; merger calibrate --gram makes"):
        merger.merge(recipe(place, "regmean", calibration={"stats": stats}))
    assert not list(place.glob("out*"))


def test_inputs_behind_merged_blocks_are_made_from_text_alone(place):
    stats = {task: f"stats/{task}.grams" for task in EXPERTS}
    with pytest.raises(RecipeError, match="no data, as inputs behind merged blocks need it, for upper, shift, double"):
        recipe(place, "regmean", parameters={"inputs": "merged"}, calibration={"stats": stats})


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [("regmean", {"inputs": "merged"}, "made behind the merged blocks"), ("obim", {}, "no stage")],
)
def test_gram_matrices_that_no_merge_could_use_are_not_kept(place, method, parameters, message):
    with pytest.raises(RecipeError, match=message):
        merger.calibrate(recipe(place, method, parameters=parameters), gram=True)


def test_a_ranking_of_the_whole_model_cannot_stand_before_a_regression(place):
    with pytest.raises(RecipeError, match="regmean takes gram, made block by block"):
        recipe(place, None, pipeline=[{"magnitude": {"density": 0.5, "scope": "global"}}, "regmean"])


def test_there_is_nothing_to_calibrate_where_nothing_is_kept(place):
    with pytest.raises(RecipeError, match="there is nothing to calibrate"):
        merger.calibrate(recipe(place, "regmean"))


# --- looked at before they are made ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["obim", "regmean"])
def test_an_inspection_foretells_where_a_calibrated_merge_ends(place, method):
    forecast = merger.inspect(recipe(place, method)).view("result")
    merger.merge(recipe(place, method))
    outcome = merger.inspect_merge(place / "out").view("result")
    assert forecast.tensors.keys() == outcome.tensors.keys()
    for name, foretold in forecast.tensors.items():
        facts = outcome.tensors[name]
        assert (foretold.at_base, foretold.at_expert, foretold.blend) == (
            facts.at_base,
            facts.at_expert,
            facts.blend,
        )


def test_what_obim_keeps_of_each_expert_never_overlaps(place):
    facts = merger.inspect(recipe(place)).view("top").whole
    assert all(value == 0 for row in facts.overlap.values() for value in row.values())
    assert sum(facts.holders[1:]) == pytest.approx(sum(facts.density.values()))
