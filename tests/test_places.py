"""Places that lack what most Linux disks have: a merge goes through all the same, or is refused in a line before it."""

import contextlib
import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import llama, load, same_bits, save

from merger.calibration.block_runner import HiddenStates
from merger.checkpoint.open_files import OpenFiles
from merger.checkpoint.output import Output
from merger.checkpoint.placement import is_mount_point
from merger.engine.machine import peak_memory
from merger.errors import RecipeError, ResourceError

RECIPE = "base: base\nexperts: {code: code, math: math}\nmethod: linear\noutput: {path: out, shard_size: 300}\n"


def run(folder, *, site="", **environment):
    """`merger run` in a process of its own, in which every Python starts with the code ``site``."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(site)
    paths = os.pathsep.join([str(folder / "site"), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", "merger", "run", "recipe.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )


def raising(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


# --- no locks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_merge_goes_through_and_leaves_nothing_beside(merger, folder, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", raising(number))
    assert merger("run", "recipe.yaml").code == 0
    assert sorted(path.name for path in folder.glob("out*")) == ["out"]


def test_without_locks_a_second_run_is_told_who_has_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(errno.ENOSYS))
    holder, intruder = (Output(tmp_path / "out", {"recipe": "1"}) for _ in range(2))
    holder.open()
    (holder.folder / "file").touch()
    with pytest.raises(
        RecipeError, match=rf"process {os.getpid()} on \S+ is writing it, or was killed .*remove \S+/owner"
    ):
        intruder.open()
    intruder.abandon()
    holder.finish(force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_locks_what_a_killed_run_left_is_taken_over_when_its_mark_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(errno.ENOSYS))
    killed = Output(tmp_path / "out", {"recipe": "1"})
    killed.open()
    (tmp_path / "out.partial" / "owner").unlink()
    following = Output(tmp_path / "out", {"recipe": "1"})
    following.open()
    following.abandon()
    assert list(tmp_path.iterdir()) == []


# --- other calls that a platform or a file system lacks -------------------------------------------


def test_where_folders_cannot_be_synced_a_merge_goes_through(merger, folder, monkeypatch):
    sync = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert merger("run", "recipe.yaml").code == 0


def test_a_disk_that_fails_to_sync_a_folder_is_an_error_all_the_same(merger, folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", raising(errno.EIO))
    ran = merger("run", "recipe.yaml")
    assert ran.code == 4
    assert "cannot be" in ran.err


@pytest.mark.parametrize("missing", [["posix_fallocate"], ["fdatasync"], ["preadv"]], ids="".join)
def test_what_python_lacks_on_macos_is_not_needed(merger, folder, monkeypatch, missing):
    assert merger("run", "recipe.yaml", "--set", "output.path=usual").code == 0
    for name in missing:
        monkeypatch.delattr(os, name)
    assert merger("run", "recipe.yaml").code == 0
    assert same_bits(load("out"), load("usual"))


def test_a_file_system_that_cannot_reserve_space_gives_the_length_alone(merger, folder, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", raising(errno.EOPNOTSUPP))
    assert merger("run", "recipe.yaml").code == 0


@pytest.mark.parametrize("status", ["Name: python\n", None], ids=["without VmHWM", "no /proc"])
def test_peak_memory_is_known_where_proc_does_not_tell_it(monkeypatch, status):
    def read_text(path, *_, **__):
        if status is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return status

    monkeypatch.setattr(Path, "read_text", read_text)
    assert peak_memory() > 10_000_000


# --- open files -----------------------------------------------------------------------------------


@contextlib.contextmanager
def open_files(margin):
    """This process may have so many more open files than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + margin, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_models_and_outputs_may_have_more_shards_than_files_may_be_open(merger, folder):
    for seed, name in enumerate(("base", "code", "math")):
        (folder / name / "model.safetensors").unlink()
        save(folder / name, llama(seed), shards=20)
    assert merger("run", "recipe.yaml", "--set", "output.path=usual").code == 0
    with open_files(24):
        assert merger("run", "recipe.yaml", "--set", "output.shard_size=80").code == 0
    assert len(list(Path("out").glob("*.safetensors"))) > 16
    assert same_bits(load("out"), load("usual"))


def test_a_file_that_was_replaced_while_it_was_closed_is_an_error(tmp_path):
    (tmp_path / "a").write_text("one")
    files = OpenFiles(os.O_RDONLY)
    with files.use(tmp_path / "a"):
        pass
    files.close()
    (tmp_path / "b").write_text("two")
    (tmp_path / "b").replace(tmp_path / "a")
    with pytest.raises(OSError, match="it was replaced meanwhile"), files.use(tmp_path / "a"):
        pass


# --- mount points ---------------------------------------------------------------------------------

MOUNTS = {
    "another file system": "mount -t tmpfs tmpfs out",
    "a folder of the same one": "mkdir volume && mount --bind volume out",
    "a name with a space": (
        "mkdir 'my out' && mount -t tmpfs tmpfs 'my out' && sed -i 's/path: out/path: my out/' recipe.yaml"
    ),
}


@pytest.mark.parametrize("kind", MOUNTS)
def test_a_mount_point_is_refused_before_the_work_with_a_place_that_works(folder, kind):
    (folder / "out").mkdir()
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*mounted, "mount -t tmpfs tmpfs out"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    command = f"{MOUNTS[kind]} && {sys.executable} -m merger run recipe.yaml"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([*mounted, command], capture_output=True, text=True, env=environment)
    assert ran.returncode == 2
    name = "my out" if "space" in kind else "out"
    assert f"{name} is a mount point, which no folder can take the place of; write to a folder in it: " in ran.stderr
    assert ran.stderr.rstrip().endswith(f"{name}/model")
    assert not list(folder.glob("*.partial"))


def test_an_ordinary_folder_is_no_mount_point(tmp_path):
    assert not is_mount_point(tmp_path)
    assert not is_mount_point(tmp_path / "missing")
    assert is_mount_point(Path("/"))


# --- a full disk for hidden states ----------------------------------------------------------------


def test_hidden_states_that_the_disk_has_no_room_for_end_no_process(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"0\.bin: the disk is full \(24 bytes are needed for it\)"):
        HiddenStates(0, tmp_path).put(0, torch.zeros(2, 3))
