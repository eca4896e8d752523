"""A disk that fails: at any single call, the old output or none is left whole, and the file is named.

Each kind of call is counted in a sound run, and then made to fail once, at each of its calls in turn.
"""

import errno
import os
import re
import resource
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import pytest
from checkpoints import llama, save

from merger.checkpoint import placement

RECIPE = "base: base\nexperts: {code: code, math: math}\nmethod: linear\noutput: {path: out, shard_size: 200}\n"


@dataclass
class Fault:
    """Fails the n-th call of a kind, and knows of which file it was."""

    kind: str
    at: int
    number: int
    calls: int = 0
    path: Path | None = None
    lock: Lock = field(default_factory=Lock)

    def met(self, file):
        """Counts a call, and raises if it is the one."""
        with self.lock:
            self.calls += 1
            hit = self.calls == self.at
        if hit:
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
            self.path = Path(path)
            raise OSError(self.number, os.strerror(self.number), path)


class Reading:
    """A file that meets the fault whenever it is read."""

    def __init__(self, file, path, fault):
        self.file, self.path, self.fault = file, path, fault

    def read(self, *size):
        self.fault.met(self.path)
        return self.file.read(*size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def function(owner, name, argument=0):
    """A kind of call by its name: ``argument`` of it tells the file."""

    def install(patch, fault):
        original = getattr(owner, name)

        def failing(*arguments, **options):
            fault.met(arguments[argument])
            return original(*arguments, **options)

        patch.setattr(owner, name, failing)

    return install


def ours(path):
    """Whether it is a file of this test, rather than one that Python or torch looks for."""
    return "pytest-" in str(path)


def reading(patch, fault):
    original_open = Path.open

    def wrapped(path, mode="r", *arguments, **options):
        file = original_open(path, mode, *arguments, **options)
        return Reading(file, path, fault) if mode == "rb" and ours(path) else file

    patch.setattr(Path, "open", wrapped)


def writing(patch, fault):
    write_bytes = Path.write_bytes

    def failing(path, content):
        fault.met(path)
        return write_bytes(path, content)

    patch.setattr(Path, "write_bytes", failing)


def exchanging(patch, fault):
    exchange = placement._exchange

    def failing(source, target):
        fault.met(target)
        return exchange(source, target)

    patch.setattr(placement, "_exchange", failing)


def swapping(patch, fault):
    """As on a system without renameat2: two renames, of which the second may fail."""
    patch.setattr(placement, "_exchange", lambda source, target: False)
    function(os, "rename")(patch, fault)


KINDS = {
    "read": reading,
    "preadv": function(os, "preadv"),
    "open": function(os, "open"),
    "pwrite": function(os, "pwrite"),
    "allocate": function(os, "posix_fallocate"),
    "write a small file": writing,
    "write the journal": function(os, "write"),
    "fsync": function(os, "fsync"),
    "rename": function(os, "rename", 1),
    "exchange": exchanging,
    "rename twice": swapping,
}
OVER = ("fsync", "exchange", "rename twice")  # an output that is there
FRESH = [kind for kind in KINDS if kind not in ("exchange", "rename twice")]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe and its models; the current folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "code", "math")):
        tensors = llama(seed, layers=0)
        save(tmp_path / name, tensors)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setenv("MERGER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nobody pulls the plug, and a busy disk takes its time
    return tmp_path


@contextmanager
def failing(monkeypatch, kind, at, number=errno.EIO):
    with monkeypatch.context() as patch:
        fault = Fault(kind, at, number)
        KINDS[kind](patch, fault)
        yield fault


def prepared(folder, old):
    """Neither output nor leftovers nor remembered hashes; or an older output, which --force is to replace."""
    for name in ("out", "out.partial", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    if old is not None:
        (folder / "out").mkdir()
        (folder / "out" / "old").write_bytes(old["old"])


def problem(ran, fault, content, old):
    """What is wrong with the end of a run that met a fault, if anything."""
    if "cache" in fault.path.parts:
        return "" if ran.code == 0 else "a cache only saves time"
    file = "out" if "rename" in fault.kind else fault.path.name
    if ran.code not in (3, 4):
        return f"it ended with {ran.code}"
    if not re.search(rf"error: .*\b{re.escape(file)}: ", ran.err):
        return f"{file} is not named: {ran.err}"
    return "" if content == old else "the output is another"


OLD = {"old": b"an old model"}


@pytest.mark.parametrize(("kind", "old"), [*((kind, None) for kind in FRESH), *((kind, OLD) for kind in OVER)])
def test_whichever_call_fails_the_old_output_or_none_is_left_and_the_file_is_named(
    merger, folder, monkeypatch, kind, old
):
    assert merger("run", "recipe.yaml").code == 0
    expected = contents(folder / "out")
    problems = {}
    with failing(monkeypatch, kind, at=0) as sound:
        prepared(folder, old)
        assert merger("run", "recipe.yaml", "--force").code == 0

    for at in range(1, sound.calls + 1):
        prepared(folder, old)
        with failing(monkeypatch, kind, at) as fault:
            ran = merger("run", "recipe.yaml", "--force")
        if fault.path is not None:  # which thread makes a call, and whether another one is left to, is chance
            problems[at] = problem(ran, fault, contents(folder / "out"), old)
        assert merger("run", "recipe.yaml", "--force").code == 0
        assert contents(folder / "out") == expected
    assert {at: text for at, text in problems.items() if text} == {}
    assert problems


@pytest.mark.parametrize("old", [None, OLD], ids=["none", "an old one"])
def test_a_disk_that_is_full_leaves_the_old_output_or_none(merger, folder, old):
    """Full after so many bytes of one file: from nothing to where the whole merge has room."""
    codes = []
    for size in (0, 20, 150, 300, 400, 600, 1200, 1800, 2500, 1 << 20):
        prepared(folder, old)
        with file_size(size):
            ran = merger("run", "recipe.yaml", "--force")
        codes.append(ran.code)
        if ran.code:
            assert contents(folder / "out") == old
            assert re.search(r"out\.partial/\S+: (the disk is full|cannot be)", ran.err), ran.err
    assert codes == [4] * codes.count(4) + [0] * codes.count(0)
    assert codes.count(4) >= 6


@contextmanager
def file_size(limit):
    """No file of this process may be larger: what is beyond is refused as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_finished_before_an_input_could_not_be_read_is_kept(merger, folder, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert merger("run", "recipe.yaml").code == 0
    expected = contents(folder / "out")
    prepared(folder, None)
    read = os.preadv

    def late(file, *arguments):
        journal = folder / "out.partial" / "journal"
        if os.readlink(f"/proc/self/fd/{file}").endswith("math/model.safetensors"):
            deadline = time.monotonic() + 0.2
            while journal.read_bytes().count(b"\n") < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            if journal.read_bytes().count(b"\n") > 1:
                raise OSError(errno.EIO, "Input/output error")
        return read(file, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", late)
        ran = merger("run", "recipe.yaml")

    assert ran.code == 3
    assert "math/model.safetensors: cannot be read: Input/output error" in ran.err
    assert "out.partial keeps the finished shards; the same run goes on from there" in ran.err
    assert "note: goes on where an earlier run stopped: 1 of " in merger("run", "recipe.yaml").err
    assert contents(folder / "out") == expected
