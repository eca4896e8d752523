"""Runs that were cut short: the next one goes on from what is finished, and ends in the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import CONFIG, llama, save, trio

import merger.checkpoint.hashes
import merger.engine.merge
from merger.engine.merge import merge
from merger.errors import CheckpointError, RecipeError, ResourceError
from merger.options import RunOptions
from merger.recipe.recipe import Recipe

METHODS = [
    pytest.param("linear", {}, id="element by element"),
    pytest.param("dare_ties", {"density": 0.5}, id="draws"),
    pytest.param("ties", {"density": 0.3}, id="a ranking of the whole model"),
    pytest.param("ties", {"density": 0.3, "zero_sign": "majority"}, id="a sign of the whole model"),
    pytest.param("slerp", {"scope": "global"}, id="an angle of the whole model"),
]
UP, EMBEDDING, HEAD = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"


class Killed(BaseException):
    """Stands for whatever ends a process."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A base and two experts; a machine with one core, so that shards are finished in order."""
    trio(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    return tmp_path


def run(folder, method="linear", parameters=None, *, path="out", force=False, options=RunOptions(), **extra):
    output = {"path": path, "shard_size": 300}
    content = {"method": method, "parameters": parameters or {}, "output": output, **extra}
    return merge(
        Recipe.parse({"base": "base", "experts": {"code": "code", "math": "math"}, **content}, folder),
        options,
        force=force,
    )


def cut_short(folder, method="linear", parameters=None, *, shards=2, error=Killed, **options):
    """A run that ends when so many shards are finished."""
    journal = folder / "out.partial" / "journal"

    def stop(step, count, total):
        if shards:
            deadline = time.monotonic() + 0.3  # the hashing of a shard may be a moment late
            while count > total * 0.8 and finished(journal) < shards and time.monotonic() < deadline:
                time.sleep(0.01)
        if finished(journal) >= shards and count:
            raise error

    with pytest.raises(error):
        run(folder, method, parameters, options=RunOptions(progress=stop), **options)


def finished(journal):
    return max(0, len(journal.read_bytes().splitlines()) - 1) if journal.exists() else 0


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(folder, *arguments, **options):
    """What an uninterrupted run writes; the same output path, for the manifest names it."""
    run(folder, *arguments, **options)
    files = contents(folder / "out")
    for path in (folder / "out").iterdir():
        path.unlink()
    (folder / "out").rmdir()
    return files


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_a_run_that_was_cut_short_ends_in_the_same_bytes(folder, method, parameters):
    expected = whole(folder, method, parameters)
    cut_short(folder, method, parameters)
    messages = []

    run(folder, method, parameters, options=RunOptions(notice=messages.append))

    assert contents(folder / "out") == expected
    assert messages[0].startswith("goes on where an earlier run stopped: ")
    assert messages[0].endswith(f" of {len(expected) - 4} shards are finished")
    assert not (folder / "out.partial").exists()


def test_what_is_finished_is_neither_read_nor_written_again(folder):
    uninterrupted = run(folder, path="whole")
    cut_short(folder, shards=3)
    resumed = run(folder)
    assert resumed.bytes_read < uninterrupted.bytes_read
    assert resumed.bytes_written < uninterrupted.bytes_written
    assert resumed.bytes_read == 3 * resumed.bytes_written


def test_progress_of_the_rest_ends_with_all_done(folder):
    cut_short(folder)
    calls = []
    result = run(folder, options=RunOptions(progress=lambda *call: calls.append(call)))
    assert list(dict.fromkeys(step for step, _, _ in calls)) == ["checking", "merging"]
    for step in ("checking", "merging"):
        (count, total) = [call[1:] for call in calls if call[0] == step][-1]
        assert count == total
    assert calls[-1][1] == result.bytes_read


def test_a_run_may_be_cut_short_again_and_again(folder):
    expected = whole(folder, "ties", {"density": 0.3})
    for shards in (1, 2, 4):
        cut_short(folder, "ties", {"density": 0.3}, shards=shards)
    run(folder, "ties", {"density": 0.3})
    assert contents(folder / "out") == expected


def test_a_run_that_had_only_to_be_renamed_is(folder, monkeypatch):
    expected = whole(folder)
    with monkeypatch.context() as patch:
        patch.setattr(merger.engine.merge.Writer, "finish", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(folder)
    assert run(folder).bytes_read == 0
    assert contents(folder / "out") == expected


def test_a_head_that_repeats_a_finished_embedding_is_made_from_it_again(folder):
    for seed, name in enumerate(("base", "code", "math")):
        tensors = llama(seed)
        # the head is the first tensor, so its shard is the first; the embedding comes after it
        save(folder / name, {**tensors, HEAD: tensors[EMBEDDING].clone()}, {**CONFIG, "tie_word_embeddings": True})
    expected = whole(folder)
    cut_short(folder, shards=1)
    run(folder)
    assert contents(folder / "out") == expected


def test_what_was_noted_before_is_in_the_manifest_after(folder):
    for seed, name in enumerate(("base", "code", "math")):
        save(folder / name, {**llama(seed), "a.ids": torch.arange(seed, seed + 3)})
    expected = whole(folder)
    cut_short(folder, shards=1)
    result = run(folder)
    assert contents(folder / "out") == expected
    assert result.notes == ["a.ids: copied from base, but differs in code, math"]


def test_a_finished_shard_that_was_damaged_is_made_again(folder):
    expected = whole(folder)
    cut_short(folder)
    for file in sorted((folder / "out.partial" / "model").iterdir())[:1]:
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    run(folder)
    assert contents(folder / "out") == expected


@pytest.mark.parametrize("torn", [b'{"shard": "model-000', b"\n", b"{}\n", b"\xff\n"])
def test_a_journal_that_was_torn_or_spoilt_only_costs_time(folder, torn):
    expected = whole(folder)
    cut_short(folder)
    with (folder / "out.partial" / "journal").open("ab") as journal:
        journal.write(torn)
    run(folder)
    assert contents(folder / "out") == expected


def test_an_unfinished_run_holds_disk_that_the_next_one_need_not_find_free(folder, monkeypatch):
    cut_short(folder)
    disk_bytes = sum(file.stat().st_blocks * 512 for file in (folder / "out.partial" / "model").iterdir())
    assert disk_bytes > 1616
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("merger.engine.preflight.shutil.disk_usage", lambda path: usage)
    run(folder)
    with pytest.raises(ResourceError, match="has 0 free"):
        run(folder, path="other")


# --- another plan ---------------------------------------------------------------------------------


def other_seed(folder):
    return {"seed": 1}


def other_inputs(folder):
    save(folder / "math", llama(7))
    return {}


def other_versions(folder):
    return {}


@pytest.mark.parametrize(
    ("change", "part"),
    [(other_seed, "recipe"), (other_inputs, "inputs"), (other_versions, "versions")],
)
def test_what_another_plan_finished_is_refused_and_forgotten_by_force(folder, monkeypatch, change, part):
    cut_short(folder)
    contents_before = contents(folder / "out.partial" / "model")
    options = change(folder)
    if change is other_versions:
        monkeypatch.setattr("merger.engine.manifest.VERSION", "99")

    with pytest.raises(
        RecipeError,
        match=rf"out\.partial: holds \d finished shards of another merge \(with other {part}\); "
        "run that one to its end, or start over with force=True",
    ):
        run(folder, **options)

    assert contents(folder / "out.partial" / "model") == contents_before
    run(folder, **options, force=True)
    resumed = contents(folder / "out")
    run(folder, **options, force=True)
    assert contents(folder / "out") == resumed


def test_force_goes_on_with_the_same_plan(folder):
    expected = whole(folder)
    cut_short(folder)
    run(folder, path="old")
    (folder / "old").rename(folder / "out")
    messages = []
    run(folder, force=True, options=RunOptions(notice=messages.append))
    assert messages[0].startswith("goes on where an earlier run stopped: ")
    assert contents(folder / "out") == expected


def test_nothing_finished_by_another_plan_is_nothing_to_refuse(folder):
    (folder / "out.partial" / "model").mkdir(parents=True)
    (folder / "out.partial" / "journal").write_text('{"plan": {"recipe": "1"}}\n')
    (folder / "out.partial" / "model" / "half").touch()
    run(folder)
    assert "half" not in contents(folder / "out")


# --- what is left ---------------------------------------------------------------------------------


def test_only_the_journal_and_finished_shards_are_left(folder):
    cut_short(folder)
    lines = [json.loads(line) for line in (folder / "out.partial" / "journal").read_text().splitlines()]
    assert lines[0].keys() == {"plan"}
    files = contents(folder / "out.partial" / "model")
    assert files.keys() == {line["shard"] for line in lines[1:]}
    assert not (folder / "out").exists()


def test_a_run_that_finished_nothing_leaves_nothing(folder):
    paths = sorted(folder.rglob("*"))
    cut_short(folder, shards=0)
    assert sorted(folder.rglob("*")) == paths


@pytest.mark.parametrize("kind", [CheckpointError, RecipeError])
def test_what_is_made_of_wrong_inputs_is_not_kept(folder, kind):
    class Wrong(kind):
        def __init__(self):
            super().__init__("is wrong")

    paths = sorted(folder.rglob("*"))
    cut_short(folder, error=Wrong)
    assert sorted(folder.rglob("*")) == paths


SLOW = """\
import sys, time
from merger.checkpoint.checkpoint import Checkpoint
read = Checkpoint.read_into
def slow(*arguments):
    time.sleep(0.2)
    return read(*arguments)
Checkpoint.read_into = slow
from merger.cli import main
sys.argv = ["merger", "run", "recipe.yaml"]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_is_finished_and_says_so(folder, merger, monkeypatch, number):
    monkeypatch.chdir(folder)
    (folder / "recipe.yaml").write_text(
        "base: base\nexperts: {code: code, math: math}\nmethod: linear\noutput: {path: out, shard_size: 300}\n"
    )
    expected = whole(folder)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    began = time.monotonic()
    while not finished(folder / "out.partial" / "journal"):
        assert process.poll() is None
        assert time.monotonic() - began < 60
        time.sleep(0.01)
    process.send_signal(number)
    output, err = process.communicate(timeout=60)

    assert (process.returncode, output) == (130, "")
    assert err == (
        f"note: {folder}/out.partial keeps the finished shards; the same run goes on from there\n"
        "interrupted; nothing was left half-written\n"
    )
    ran = merger("run", "recipe.yaml")
    assert ran.err.startswith("note: goes on where an earlier run stopped: ")
    assert contents(folder / "out") == expected
