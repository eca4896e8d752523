"""The same bytes for every function, whatever the threads, slices, memory, loops, shards, breaks and hash seeds."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import llama, load, same_bits, save
from pretended import CudaRounding

import merger.engine.machine
import merger.methods
from merger.calibration import Moments, Settings
from merger.calibration import statistics_files as files
from merger.calibration.origins import fingerprint
from merger.calibration.settings import ForwardPass
from merger.checkpoint.opening import open_checkpoint
from merger.checkpoint.writer import Writer
from merger.engine.merge import merge
from merger.errors import CheckpointError
from merger.ops import kernels
from merger.options import RunOptions
from merger.pipeline.registry import ENTRIES, SCORES
from merger.recipe.recipe import Recipe

EXPERTS = ("code", "math", "wiki")
UNKEPT = {
    *("adamerging", "distill", "featcal", "fisher", "learn", "model_tailor", "prodistill", "regmean", "regmean_pp"),
    *("sparsegpt", "tailor", "ugm"),
}
"""The methods whose inputs are in no file here."""
SHARDS = 400
ALL = [name for name in [*ENTRIES, *SCORES] if name not in UNKEPT]


def chosen(name):
    """A merge with a function in it, whatever it is."""
    kind = ENTRIES[name].kind if name in ENTRIES else "sparsifier"
    if kind == "method":
        return {"method": name}
    stage = {name: {"inner": "ties"} if name == "knots" else {}}
    return {"pipeline": {"sparsifier": [stage, "sum"], "merger": [stage], "pack": [stage]}.get(kind, ["sum", stage])}


def recipe(name, shard_size=SHARDS):
    number = ENTRIES[name].experts if name in ENTRIES else None
    experts = EXPERTS[: number or 3]
    return {
        "base": "base",
        "experts": {expert: expert for expert in experts},
        **chosen(name),
        "calibration": {"stats": {expert: f"{expert}.stats" for expert in experts}},
        "output": {"path": "out", "shard_size": shard_size},
        "seed": 3,
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three experts of real-looking bfloat16 weights, with statistics of their inputs."""
    folder = tmp_path_factory.mktemp("models")
    base = llama(0, layers=1, dtype=torch.bfloat16)
    for seed, name in enumerate(("base", *EXPERTS)):
        generator = torch.Generator().manual_seed(seed)
        drawn = {n: 0.1 * seed * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save(folder / name, {n: (t.float() + drawn[n]).bfloat16() for n, t in base.items()})
    for seed, name in enumerate(EXPERTS):
        with open_checkpoint(name, None, label=name, folder=folder) as model:
            generator = torch.Generator().manual_seed(seed)
            moments = {
                n: Moments(torch.tensor(9), *torch.randn(2, i.shape[-1], generator=generator).square())
                for n, i in model.tensors.items()
                if len(i.shape) == 2
            }
            key = files.StatisticsKey(fingerprint(model), "text", "tokenizer", Settings(), ForwardPass.of(model, "cpu"))
            files.save(folder / f"{name}.stats", moments, key)
    return folder


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """A folder of its own in which the models are found."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return tmp_path


def merged(folder, name, shard_size=SHARDS, **options):
    """Every file of a merge; it is at the same place each time, for the manifest names that."""
    merge(Recipe.parse(recipe(name, shard_size), folder), RunOptions(**options))
    files = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    shutil.rmtree(folder / "out")
    return files


def merged_in_two_runs(folder, name, monkeypatch):
    """The same by a run that is killed when half of the shards are finished, and by the one that goes on from there."""

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", killed)
        with pytest.raises(Killed):
            merged(folder, name)
    journal = folder / "out.partial" / "journal"
    plan, *finished = journal.read_text().splitlines()
    journal.write_text("\n".join([plan, *finished[::2], ""]))
    messages = []
    files = merged(folder, name, notice=messages.append)
    assert (
        f"goes on where an earlier run stopped: {len(finished[::2])} of {len(finished)} shards are finished" in messages
    )
    return files


class Killed(BaseException):
    """Stands for whatever ends a process."""


def digests(folder):
    """One SHA-256 for all files of each merge."""
    return {
        name: hashlib.sha256(b"".join(files[file] for file in sorted(files))).hexdigest()
        for name in ALL
        for files in [merged(folder, name)]
    }


@pytest.fixture(scope="module")
def elsewhere(models):
    """What `digests` finds in a process whose dictionaries and sets have another order."""
    program = "import json, pathlib, test_same_bytes as t; print(json.dumps(t.digests(pathlib.Path.cwd())))"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=models,
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout)


@pytest.mark.parametrize("name", ALL)
def test_neither_threads_slices_memory_compiled_loops_breaks_nor_hash_seeds_decide_a_byte(
    folder, monkeypatch, elsewhere, name
):
    files = merged(folder, name)
    with monkeypatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 7)
        patch.setattr(merger.engine.memory, "SLICE", 24)
        patch.setattr(merger.engine.memory, "HOLD", 0)
        patch.setattr(kernels, "compiled", lambda: False)
        assert merged(folder, name, max_memory=merger.engine.memory.INTERPRETER + 1_000_000) == files
    assert merged_in_two_runs(folder, name, monkeypatch) == files
    assert elsewhere[name] == hashlib.sha256(b"".join(files[file] for file in sorted(files))).hexdigest()


@pytest.mark.parametrize("name", ALL)
def test_the_size_of_shards_decides_no_byte_of_a_tensor(folder, name):
    tensors = []
    for size in (SHARDS, 10**9):
        merge(Recipe.parse(recipe(name, size), folder), force=True)
        tensors.append(load(folder / "out"))
    assert same_bits(*tensors)


def differing(files, other_files):
    """The files of a merge that another has otherwise, but for the manifest, which names the device."""
    assert files.keys() == other_files.keys()
    return {file for file in files if files[file] != other_files[file]} - {"merger.json"}


def device_dependent(files):
    return json.loads(files["merger.json"])["device-dependent"]


@pytest.mark.parametrize("name", ALL)
def test_a_merge_whose_bytes_depend_on_how_a_device_rounds_says_so(folder, devices, name):
    files = merged(folder, name)
    devices("cuda:0", "cuda:1", pretence=CudaRounding)
    elsewhere = merged(folder, name)
    assert device_dependent(files) or not differing(files, elsewhere)


SEVERAL = ["linear", "ties", "dare_ties", "obim", "cabs", "rescale", "tsv_m", "emr", "byom", "factors"]


@pytest.mark.parametrize("name", SEVERAL)
def test_several_devices_give_the_bytes_of_one_and_their_tensors_never_meet(folder, devices, name):
    files = merged(folder, name)
    devices("cpu", "cpu", "cpu")
    assert merged(folder, name) == files
    devices("cuda:0", "cuda:1")
    assert not differing(files, merged(folder, name))


def test_a_slice_that_fails_on_one_of_several_devices_is_told_of_once_and_leaves_nothing(folder, devices):
    tensors = load(folder / "code")
    tensors["model.layers.0.mlp.up_proj.weight"][-1, -1] = float("nan")
    (folder / "code").unlink()
    save(folder / "code", tensors)
    devices("cpu", "cuda:0", "cpu")
    paths = set(folder.iterdir())
    with pytest.raises(CheckpointError, match=r"^code: model.layers.0.mlp.up_proj.weight holds NaN or infinity$"):
        merged(folder, "linear")
    assert set(folder.iterdir()) == paths


def test_what_one_number_of_devices_began_another_goes_on_with(folder, devices, monkeypatch):
    devices("cpu")
    files = merged(folder, "ties")
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merged(folder, "ties")
    devices("cpu", "cpu")
    messages = []
    assert merged(folder, "ties", notice=messages.append) == files
    assert [line for line in messages if line.startswith("goes on where an earlier run stopped")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ALL)
def test_a_gpu_writes_the_same_bytes_or_the_merge_says_why_not(folder, name):
    cpu_files, gpu_files = (merged(folder, name, device=device) for device in ("cpu", "cuda"))
    assert device_dependent(cpu_files) or not differing(cpu_files, gpu_files)
