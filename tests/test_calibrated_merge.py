"""Merges that look at layer inputs, from text to checkpoint, on the demo's trained models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import load

import merger
from merger import demo_tasks
from merger.calibration import Settings, batches, collect_all, texts
from merger.checkpoint.opening import open_checkpoint
from merger.errors import CheckpointError, RecipeError

MODELS = Path(merger.__file__).parent / "demo_models"
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


def recipe(place, method="obim", *, output="out", dtype="bfloat16", **more):
    calibration = {"data": {task: f"{task}.jsonl" for task in EXPERTS}, "samples": 12}
    written = {
        "base": "models/base",
        "experts": {task: f"models/{task}" for task in EXPERTS},
        "method": method,
        "calibration": calibration,
        "output": {"path": output, "dtype": dtype},
        **more,
    }
    return merger.Recipe.parse(written, folder=place)


def weights(place, output="out"):
    return (place / output / "model.safetensors").read_bytes()


def forbid_forward_passes(monkeypatch):
    def collect(*_, **__):
        raise AssertionError("a forward pass was made")

    monkeypatch.setattr("merger.statistics.collect", collect)


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_are_made_once_and_found_again_to_the_same_bytes(place, monkeypatch):
    merger.merge(recipe(place))
    forbid_forward_passes(monkeypatch)
    merger.merge(recipe(place, output="again"))
    assert weights(place, "again") == weights(place)


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
        sources = torch.stack([base[name], *(each[name] for each in experts)])
        assert (value == sources).any(0).all(), name


def test_statistics_of_another_model_are_refused_before_anything_is_written(place):
    merger.calibrate(recipe(place), to=place / "stats")
    stats = {task: f"stats/{other}.stats.safetensors" for task, other in zip(EXPERTS, EXPERTS[::-1], strict=True)}
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


# --- Gram matrices --------------------------------------------------------------------------------


def moments_of(place, task):
    """What enters an expert's matrices, all blocks at once."""
    folder = place / "models" / task
    settings = Settings(samples=12)
    tokenizer = texts.load_tokenizer(folder, task, trust_remote_code=False)
    samples = texts.load(f"{task}.jsonl", place, tokenizer, settings)
    with open_checkpoint(str(folder), None, label=task, folder=place) as model:
        return collect_all(model, batches(samples.tokens), settings, gram=True)


def test_regmean_block_by_block_is_the_regression_over_whole_models(place):
    merger.merge(recipe(place, "regmean", parameters={"alpha": 0.7}, dtype="float32"))
    merged, base = load(place / "out"), load(MODELS / "base")
    experts, moments = [load(MODELS / task) for task in EXPERTS], [moments_of(place, task) for task in EXPERTS]
    matrices = [name for name in base if ".mlp." in name or "_proj" in name]
    assert len(matrices) == 3 * 7
    for name, value in base.items():
        deltas = [(each[name].double() - value.double()) for each in experts]
        expected = sum(deltas) / 3
        if name in matrices:
            grams = [each[name].gram.double() for each in moments]
            grams = [0.7 * gram + 0.3 * gram.diagonal().diag() for gram in grams]
            solved = torch.linalg.solve(sum(grams), sum(g @ d.T for g, d in zip(grams, deltas, strict=True)))
            expected = solved.T
        error = (merged[name].double() - value.double() - expected).norm() / expected.norm()
        assert error < 1e-5, name


def test_gram_matrices_are_made_from_text_so_statistics_files_do_not_do(place):
    files = merger.calibrate(recipe(place), to=place / "stats")
    stats = {name: f"stats/{path.name}" for name, path in files.items()}
    with pytest.raises(RecipeError, match="no data, from which alone Gram matrices are made, for upper, shift, double"):
        recipe(place, "regmean", calibration={"stats": stats})


def test_a_ranking_of_the_whole_model_cannot_stand_before_a_regression(place):
    with pytest.raises(RecipeError, match="Gram matrices come block by block"):
        recipe(place, None, pipeline=[{"magnitude": {"density": 0.5, "scope": "global"}}, "regmean"])


def test_there_is_nothing_to_calibrate_where_nothing_is_kept(place):
    with pytest.raises(RecipeError, match="there is nothing to calibrate"):
        merger.calibrate(recipe(place, "regmean"))


# --- looked at before they are made ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["obim", "regmean"])
def test_an_inspection_foretells_where_a_calibrated_merge_ends(place, method):
    before = merger.inspect(recipe(place, method)).view("result")
    merger.merge(recipe(place, method))
    after = merger.inspect_merge(place / "out").view("result")
    assert before.tensors.keys() == after.tensors.keys()
    for name, foretold in before.tensors.items():
        found = after.tensors[name]
        assert (foretold.at_base, foretold.at_expert, foretold.blend) == (found.at_base, found.at_expert, found.blend)


def test_what_obim_keeps_of_each_expert_never_overlaps(place):
    kept = merger.inspect(recipe(place)).view("top").whole
    assert all(value == 0 for row in kept.overlap.values() for value in row.values())
    assert sum(kept.holders[1:]) == pytest.approx(sum(kept.density.values()))
