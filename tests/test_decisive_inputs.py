"""Each input file and each setting is changed in turn: whatever is kept of a merge must be found no longer.

What is kept: statistics and Gram matrices (by their keys), locks, finished shards of an interrupted merge, and the
record of a search.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merger.demo
from merger.calibration.statistics import statistics_keys
from merger.demo import tasks as demo_tasks
from merger.engine.merge import decisive_inputs
from merger.engine.prepare import prepare
from merger.evaluation.search import _Search, search
from merger.options import RunOptions
from merger.outputs.lock import lock
from merger.recipe.recipe import Recipe

MODELS = Path(merger.demo.__file__).parent / "models"
TASKS = ("upper", "shift")
CPU = RunOptions(device="cpu")
RECIPE = {
    "base": "base",
    "experts": {"upper": "upper", "shift": {"model": "double", "adapter": "shift"}},
    "method": "regmean",
    "calibration": {"data": {task: f"{task}.jsonl" for task in TASKS}, "samples": 4, "max_tokens": 16},
    "evaluation": {"data": {task: f"{task}.answers.jsonl" for task in TASKS}, "samples": 4, "dtype": "float32"},
    "output": {"path": "out"},
    "seed": 0,
}
SEARCH = {"strategy": "random", "trials": 2, "samples": 4}

STATISTICS, SHARDS, LOCK, RECORD = "statistics", "shards", "lock", "search"
EVERYTHING = {STATISTICS, SHARDS, LOCK, RECORD}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Models, an adapter, text and held-out examples."""
    folder = tmp_path_factory.mktemp("original")
    for model in ("base", "upper", "double"):
        shutil.copytree(MODELS / model, folder / model)
    adapter(folder / "shift")
    for task in TASKS:
        text = [{"text": prompt + answer} for prompt, answer in demo_tasks.examples(task, "calibration", 8)]
        examples = [{"prompt": prompt, "answer": answer} for prompt, answer in demo_tasks.examples(task, "heldout", 12)]
        write(folder / f"{task}.jsonl", text)
        write(folder / f"{task}.answers.jsonl", examples)
    return folder


def adapter(folder):
    config = json.loads((MODELS / "base" / "config.json").read_bytes())
    size = config["hidden_size"]
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{name}.lora_A.weight": torch.ones(2, size), f"{name}.lora_B.weight": torch.ones(size, 2)}
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    adapter_config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def kept(folder, tmp_path, changes=()):
    """What each thing that is kept is found by."""
    recipe = Recipe.parse({**RECIPE, **dict(changes)}, folder)
    with prepare(recipe, CPU) as prepared:
        keys = {name: key.file_name() for name, key in statistics_keys(prepared.plan, CPU).items()}
        shards = decisive_inputs(prepared, {})
    locked = lock(recipe, tmp_path / "recipe.lock", CPU)
    return {STATISTICS: keys, SHARDS: shards, LOCK: locked, RECORD: record_of(folder, dict(changes))}


def record_of(folder, changes):
    """The first line of a search's record; nothing is merged for it."""
    document = {**RECIPE, "search": SEARCH, **changes}
    document["parameters"] = {"lambda": {"search": {"low": 0, "high": 1}}, **document.get("parameters", {})}
    (folder / "search.yaml").write_text(json.dumps(document))
    shutil.rmtree(folder / "search.search", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Search, "references", stop)
        with pytest.raises(Stopped):
            search(folder / "search.yaml", options=CPU)
    return (folder / "search.search" / "trials.jsonl").read_text().splitlines()[0]


class Stopped(BaseException):
    """Ends a search before its first model."""


def stop(*_):
    raise Stopped


def noticed(state_before, state_after):
    return {name for name in state_before if state_before[name] != state_after[name]}


def edited(path, **changes):
    """A JSON file with other values."""
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def flipped(path):
    """A file whose last byte has another bit."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def appended(path):
    """JSON Lines with a record more at the front, as the last ones may not be chosen."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    write(path, [{key: f"{value} again" for key, value in record.items()} for record in records])


def truncating(path):
    """A tokenizer of the same tokens that cuts what it reads."""
    edited(path, truncation={"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0})


FILES = {
    "upper/config.json": (lambda path: edited(path, rms_norm_eps=0.1), EVERYTHING),
    "upper/model.safetensors": (flipped, EVERYTHING),
    "upper/tokenizer.json": (truncating, EVERYTHING),
    "upper/tokenizer_config.json": (lambda path: edited(path, model_max_length=9), EVERYTHING),
    "double/config.json": (lambda path: edited(path, rms_norm_eps=0.1), EVERYTHING),
    "double/model.safetensors": (flipped, EVERYTHING),
    "double/tokenizer.json": (truncating, EVERYTHING),
    "double/tokenizer_config.json": (lambda path: edited(path, model_max_length=9), EVERYTHING),
    "shift/adapter_config.json": (lambda path: edited(path, lora_alpha=4), EVERYTHING),
    "shift/adapter_model.safetensors": (flipped, EVERYTHING),
    "upper.jsonl": (appended, EVERYTHING),
    "shift.jsonl": (appended, EVERYTHING),
    "base/config.json": (lambda path: edited(path, rms_norm_eps=0.1), EVERYTHING - {STATISTICS}),
    "base/model.safetensors": (flipped, EVERYTHING - {STATISTICS}),
    "base/tokenizer.json": (truncating, {LOCK, RECORD}),
    "base/tokenizer_config.json": (lambda path: edited(path, model_max_length=9), {LOCK, RECORD}),
    "base/generation_config.json": (lambda path: edited(path, eos_token_id=7), {LOCK, RECORD}),
    "upper.answers.jsonl": (appended, {RECORD}),
    "shift.answers.jsonl": (appended, {RECORD}),
}
UNUSED = {"upper/generation_config.json", "double/generation_config.json"}  # a merge has that of its base


def test_every_file_is_changed_here(original):
    files = {str(path.relative_to(original)) for path in original.rglob("*") if path.is_file()}
    assert files == FILES.keys() | UNUSED


@pytest.fixture(scope="module")
def unchanged(original, tmp_path_factory):
    """What is kept of the original."""
    return kept(original, tmp_path_factory.mktemp("lock"))


@pytest.fixture
def restored(original):
    """Puts files back as they were, with their times."""
    files = {path: (path.read_bytes(), path.stat()) for path in original.rglob("*") if path.is_file()}
    yield
    for path, (content, status) in files.items():
        if path.stat().st_mtime_ns != status.st_mtime_ns:
            path.write_bytes(content)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changed_is_noticed(original, tmp_path, unchanged, name):
    change, expected = FILES[name]
    change(original / name)
    assert noticed(unchanged, kept(original, tmp_path)) == expected


def test_files_that_are_the_same_elsewhere_are_found_again(original, tmp_path, unchanged):
    folder = shutil.copytree(original, tmp_path / "copy")
    assert noticed(unchanged, kept(folder, tmp_path)) == {SHARDS}  # whose inputs are known by their places and times


CALIBRATION = {
    "samples": 3,
    "max_tokens": 5,
    "weighting": "sample",
    "skip_first_tokens": 1,
    "calib_text": "input+target",
    "data": "upper.jsonl",
}
SETTINGS = {
    **{name: {"calibration": {**RECIPE["calibration"], name: value}} for name, value in CALIBRATION.items()},
    "seed": {"seed": 1},
}
MERGING = {
    "method": {"method": "regmean_diag"},
    "parameters": {"parameters": {"alpha": 0.5}},
    "weight": {"experts": {**RECIPE["experts"], "upper": {"model": "upper", "weight": 2}}},
    "rules": {"rules": [{"kinds": ["vector"], "use": "base"}]},
    "dtype": {"output": {"path": "out", "dtype": "bfloat16"}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_calibration_that_changed_is_noticed(original, unchanged, tmp_path, name):
    assert noticed(unchanged, kept(original, tmp_path, SETTINGS[name])) == EVERYTHING


@pytest.mark.parametrize("name", MERGING)
def test_a_setting_of_the_merge_that_changed_is_noticed(original, unchanged, tmp_path, name):
    changes = noticed(unchanged, kept(original, tmp_path, MERGING[name]))
    assert changes >= {SHARDS, LOCK, RECORD}


def test_every_setting_of_calibration_is_changed_here():
    from merger.recipe.recipe import Calibration

    assert CALIBRATION.keys() | {"stats"} == Calibration.model_fields.keys()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_statistics_of_one_kind_of_device_are_not_those_of_another(original, device):
    recipe = Recipe.parse(RECIPE, original)
    with prepare(recipe, CPU) as prepared:
        cpu_names, device_names = (
            {name: key.file_name() for name, key in statistics_keys(prepared.plan, RunOptions(device=kind)).items()}
            for kind in ("cpu", device)
        )
    assert (cpu_names == device_names) == (device == "cpu")
