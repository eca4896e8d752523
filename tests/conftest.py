"""What several files of tests share."""

import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import trio
from hypothesis import HealthCheck, settings
from pretended import Pretence

# Threads that wait for each other on busy cores make a merge of ten numbers take half a second.
torch.set_num_threads(1)

# `pytest --hypothesis-profile=thorough` looks further, at other examples each time.
settings.register_profile(
    "quick",
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
settings.register_profile("thorough", settings.get_profile("quick"), max_examples=100, derandomize=False)
settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test sees what the machine's user has kept, nor leaves anything there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A folder with the recipe ``RECIPE`` of the test's file and its models; the current one."""
    monkeypatch.chdir(tmp_path)
    trio(tmp_path)
    (tmp_path / "recipe.yaml").write_text(request.module.RECIPE)
    return tmp_path


@pytest.fixture(scope="session")
def golden():
    """Cases by name, {method, params, inputs, outputs}, from an independent float64 program."""
    return json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.fixture
def devices(monkeypatch):
    """Lets a machine have these devices; what torch does not know is pretended, in the threads that work on slices."""

    def have(*names, pretence=Pretence, memory=1 << 30):
        class Slices(ThreadPoolExecutor):
            def __init__(self, workers, name):
                super().__init__(workers, name, initializer=lambda: pretence().__enter__())

        monkeypatch.setattr("merger.engine.machine.select_devices", lambda choice: names)
        monkeypatch.setattr("merger.outputs.lock.select_devices", lambda choice: names)
        monkeypatch.setattr("merger.engine.machine.free_memory", lambda device: memory)
        monkeypatch.setattr("merger.engine.memory.SLICE", 24)
        monkeypatch.setattr("merger.engine.schedule.ThreadPoolExecutor", Slices)

    return have


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def merger(monkeypatch, capsys):
    """The `merger` command, run in this process: ``merger("plan", "recipe.yaml")``."""
    from merger.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["merger", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Ran(code, *capsys.readouterr())

    return call
