"""Locks: the same recipe on the same inputs passes, whatever else has changed is named, what is done is left alone."""

import hashlib
import json
import os

import pytest
import yaml
from checkpoints import CONFIG, llama, save, trio

from merger.outputs import lock as locking

RECIPE = {
    "base": "base",
    "experts": {"code": "code", "math": {"model": "math", "weight": "1/3"}},
    "method": "ties",
    "output": {"path": "out", "shard_size": 900},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe and its models; the current folder."""
    monkeypatch.chdir(tmp_path)
    trio(tmp_path)
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    write(tmp_path, RECIPE)
    return tmp_path


def write(folder, recipe):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_lock_says_from_what_and_how_before_it_is_made(merger, folder):
    ran = merger("lock", "recipe.yaml")

    assert (ran.code, ran.out) == (0, "recipe.lock: 3 inputs, 2 files beside the weights\n")
    locked = json.loads((folder / "recipe.lock").read_text())
    assert locked["inputs"] == {
        name: {
            "source": name,
            "files": {"model.safetensors": sha256(folder / name / "model.safetensors")},
            "config": hashlib.sha256(json.dumps(CONFIG, sort_keys=True).encode()).hexdigest(),
        }
        for name in ("base", "code", "math")
    }
    assert locked["recipe"]["experts"]["math"]["weight"] == "1/3"
    assert locked["recipe"]["seed"] == 0
    assert str(folder) not in json.dumps(locked)

    assert merger("run", "recipe.yaml", "--locked").code == 0
    record = json.loads((folder / "out" / "merger.json").read_text())
    for part in ("recipe", "versions", "inputs", "calibration", "files"):
        assert record[part] == locked[part]


def test_an_unchanged_lock_with_a_whole_output_is_nothing_to_do(merger, folder):
    merger("lock", "recipe.yaml")
    first = merger("run", "recipe.yaml", "--locked")
    contents_before = contents(folder / "out")

    ran = merger("run", "recipe.yaml", "--locked")

    assert first.out.startswith(f"{folder}/out: 21 merged tensors")
    assert (ran.code, ran.out, ran.err) == (0, f"{folder}/out: is what the lock says, and whole; nothing to do\n", "")
    assert json.loads(merger("run", "recipe.yaml", "--locked", "--json").out)["unchanged"] is True
    assert contents(folder / "out") == contents_before


@pytest.fixture
def read_through(monkeypatch):
    """The output's files that are read to their end."""
    names = []
    digest = locking.digest
    monkeypatch.setattr(locking, "digest", lambda path, tell: names.append(path.name) or digest(path, tell))
    return names


def test_an_output_of_the_same_size_and_time_is_not_read_on_request(merger, folder, read_through):
    merger("lock", "recipe.yaml")
    merger("run", "recipe.yaml", "--locked")

    ran = merger("run", "recipe.yaml", "--locked", "--trust-mtime")
    assert (ran.code, ran.out) == (0, f"{folder}/out: is what the lock says, and whole; nothing to do\n")
    assert read_through == []

    merger("run", "recipe.yaml", "--locked")
    assert len(read_through) == 2


def test_a_time_that_is_not_remembered_costs_a_pass_and_is_remembered_then(merger, folder, read_through):
    merger("lock", "recipe.yaml")
    merger("run", "recipe.yaml", "--locked")
    os.utime(folder / "out" / "model-00001-of-00002.safetensors")
    for _ in range(2):
        assert merger("run", "recipe.yaml", "--locked", "--trust-mtime").code == 0
        assert read_through == ["model-00001-of-00002.safetensors"]


@pytest.mark.parametrize("damage", ["other bytes", "fewer bytes", "no shard", "no config"])
def test_trusting_times_still_finds_what_shows_without_reading(merger, folder, damage):
    merger("lock", "recipe.yaml")
    merger("run", "recipe.yaml", "--locked")
    shard = folder / "out" / "model-00002-of-00002.safetensors"
    if damage == "other bytes":
        with shard.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
    elif damage == "fewer bytes":
        os.truncate(shard, shard.stat().st_size - 1)
    else:
        (shard if damage == "no shard" else folder / "out" / "config.json").unlink()
    assert "is there already" in merger("run", "recipe.yaml", "--locked", "--trust-mtime").err


def test_trusting_times_is_a_part_of_running_locked(merger, folder):
    ran = merger("run", "recipe.yaml", "--trust-mtime")
    assert (ran.code, ran.err) == (2, "error: --trust-mtime: is about what --locked would do; say both\n")


def test_an_output_that_is_damaged_or_of_another_lock_is_not_taken_for_done(merger, folder):
    merger("lock", "recipe.yaml")
    merger("run", "recipe.yaml", "--locked")
    with (folder / "out" / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    ran = merger("run", "recipe.yaml", "--locked")
    assert ran.code == 2
    assert "is there already" in ran.err
    assert merger("run", "recipe.yaml", "--locked", "--force").code == 0

    write(folder, {**RECIPE, "seed": 4})
    merger("lock", "recipe.yaml")
    assert "is there already" in merger("run", "recipe.yaml", "--locked").err


def test_a_tokenizer_that_changed_since_is_another_output(merger, folder):
    merger("lock", "recipe.yaml")
    merger("run", "recipe.yaml", "--locked")
    (folder / "base" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"b": 0}}}))
    assert "files.tokenizer.json was" in merger("run", "recipe.yaml", "--locked").err
    merger("lock", "recipe.yaml")
    assert "is there already" in merger("run", "recipe.yaml", "--locked").err


def test_everything_that_differs_is_named_and_nothing_is_written(merger, folder, monkeypatch):
    merger("lock", "recipe.yaml")
    old, new = (sha256(save(folder / "math", llama(seed)) / "model.safetensors") for seed in (2, 7))
    write(folder, {**RECIPE, "seed": 4})
    monkeypatch.setattr("merger.engine.manifest.VERSION", "99")

    ran = merger("run", "recipe.yaml", "--locked")

    assert ran.code == 2
    assert "error: recipe.lock: recipe.seed was 0 when it was locked, and is 4\n" in ran.err
    assert ', and is "99"\n' in ran.err
    message = f'recipe.lock: inputs.math.files.model.safetensors was "{old}" when it was locked, and is "{new}"\n'
    assert message in ran.err
    assert ran.err.splitlines()[-1] == "error: recipe.lock: lock the recipe again if that is meant"
    assert not (folder / "out").exists()


def test_an_override_counts_as_a_part_of_the_recipe(merger, folder):
    merger("lock", "recipe.yaml", "--set", "seed=5")
    assert "recipe.seed was 5 when it was locked, and is 0" in merger("run", "recipe.yaml", "--locked").err
    assert merger("run", "recipe.yaml", "--locked", "--set", "seed=5").code == 0


def test_a_config_that_changes_what_is_done_is_named(merger, folder):
    merger("lock", "recipe.yaml")
    (folder / "base" / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 7}))
    assert "recipe.lock: files.config.json was" in merger("run", "recipe.yaml", "--locked").err


def test_a_config_of_an_expert_that_decides_its_forward_pass_is_named(merger, folder):
    merger("lock", "recipe.yaml")
    (folder / "math" / "config.json").write_text(json.dumps({**CONFIG, "hidden_act": "gelu"}))
    assert "recipe.lock: inputs.math.config was" in merger("run", "recipe.yaml", "--locked").err


def test_a_config_that_is_laid_out_anew_by_another_version_is_the_same(merger, folder):
    merger("lock", "recipe.yaml")
    rewritten = {"transformers_version": "99", "_name_or_path": "/elsewhere", **dict(reversed(CONFIG.items()))}
    (folder / "math" / "config.json").write_text(json.dumps(rewritten, indent=4))
    assert merger("run", "recipe.yaml", "--locked").code == 0


def test_the_kind_of_device_is_locked_where_it_decides_the_bytes(merger, folder, devices):
    write(folder, {**RECIPE, "method": "tsv_m"})
    merger("lock", "recipe.yaml")
    devices("cuda:0")
    message = 'recipe.lock: device was "cpu" when it was locked, and is "cuda"\n'
    assert message in merger("run", "recipe.yaml", "--locked").err


def test_a_lock_of_what_every_device_makes_alike_holds_on_all(merger, folder, devices):
    merger("lock", "recipe.yaml")
    devices("cuda:0")
    assert merger("run", "recipe.yaml", "--locked").code == 0
    assert "nothing to do" in merger("run", "recipe.yaml", "--locked").out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "recipe.lock: cannot be read: No such file or directory; make it with `merger lock`"),
        (
            "{",
            "recipe.lock: is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1); make it again with `merger lock`",
        ),
        ("[]", "recipe.lock: is no lock of merger; make it again with `merger lock`"),
        ('{"format": 1}', "recipe.lock: is of format 1, and this version reads 2; make it again with `merger lock`"),
        (
            '{"format": 2, "versions": {}, "device": null, "recipe": {}, "inputs": {}, "calibration": {}}',
            "recipe.lock: is damaged: it has no files and no tensors; make it again with `merger lock`",
        ),
    ],
)
def test_a_lock_that_is_none_says_what_to_do(merger, folder, text, message):
    if text is not None:
        (folder / "recipe.lock").write_text(text)
    ran = merger("run", "recipe.yaml", "--locked")
    assert ran.code == 2
    assert ran.err.startswith(f"error: {message}")


def test_a_lock_never_takes_the_place_of_its_recipe(merger, folder):
    (folder / "recipe.yaml").rename(folder / "mine.lock")
    ran = merger("lock", "mine.lock")
    assert (ran.code, ran.err) == (
        2,
        "error: mine.lock: is named as its own lock would be; name it mine.yaml\n",
    )


# --- calibration ----------------------------------------------------------------------------------


def calibrated(**calibration):
    return {**RECIPE, "method": "obim", "calibration": calibration}


def test_text_and_statistics_are_locked_by_their_bytes(merger, folder):
    for name in ("code", "math"):
        (folder / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (folder / "text.jsonl").write_text('{"text": "a"}\n')
    (folder / "math.stats").write_bytes(b"known")
    write(folder, calibrated(data={"code": "text.jsonl"}, stats={"math": "math.stats"}))
    assert merger("lock", "recipe.yaml").code == 0

    locked = json.loads((folder / "recipe.lock").read_text())["calibration"]
    assert locked.keys() == {"tokenizer of code", "text.jsonl", "math.stats"}
    assert locked["text.jsonl"] == sha256(folder / "text.jsonl")

    (folder / "text.jsonl").write_text('{"text": "b"}\n')
    assert "recipe.lock: calibration.text.jsonl was" in merger("run", "recipe.yaml", "--locked").err


def test_every_source_of_text_and_its_count_are_locked(merger, folder):
    for name in ("code", "math"):
        (folder / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text('{"question": "a"}\n{"question": "b"}\n')
    column = {"prompt": "question"}
    code_source, math_source = ({"file": name, "samples": 1, "fields": column} for name in ("a.jsonl", "b.jsonl"))
    write(folder, calibrated(data={"code": [code_source, math_source], "math": math_source}))
    assert merger("lock", "recipe.yaml").code == 0

    write(folder, calibrated(data={"code": [code_source, {**math_source, "samples": 2}], "math": math_source}))
    assert "recipe.lock: recipe.calibration.data.code was" in merger("run", "recipe.yaml", "--locked").err
    write(
        folder,
        calibrated(data={"code": [code_source, {**math_source, "fields": {"text": "question"}}], "math": math_source}),
    )
    assert "recipe.lock: recipe.calibration.data.code was" in merger("run", "recipe.yaml", "--locked").err

    write(folder, calibrated(data={"code": [code_source, math_source], "math": math_source}))
    (folder / "a.jsonl").write_text('{"question": "c"}\n')
    assert "recipe.lock: calibration.a.jsonl was" in merger("run", "recipe.yaml", "--locked").err


def test_two_files_of_one_name_in_two_folders_are_both_locked(merger, folder):
    for name in ("code", "math"):
        (folder / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
        (folder / name / "text.jsonl").write_text(json.dumps({"text": name}))
    write(folder, calibrated(data={name: str((folder / name / "text.jsonl").resolve()) for name in ("code", "math")}))
    assert merger("lock", "recipe.yaml").code == 0
    locked = json.loads((folder / "recipe.lock").read_text())["calibration"]
    assert locked["text.jsonl"] == sha256(folder / "code/text.jsonl")
    assert locked["text.jsonl of math"] == sha256(folder / "math/text.jsonl")


def test_a_dataset_of_the_hub_cannot_be_locked(merger, folder):
    write(folder, calibrated(data="org/data"))
    ran = merger("lock", "recipe.yaml")
    assert (ran.code, ran.err) == (
        2,
        "error: calibration: org/data is no file here, and may change; save it to lock it\n",
    )
    assert not (folder / "recipe.lock").exists()
