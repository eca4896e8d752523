"""What a machine gives to a merge: which devices, and who works on what."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import inf
from pathlib import Path
from threading import Barrier, Lock

import pytest
import torch
from checkpoints import save_headers
from test_input_cost import planned  # noqa: F401 a fixture

from merger.engine.machine import Machine, Room, assign_sizes, free_host_memory, free_memory, select_devices
from merger.engine.memory import CUDA, MemoryNeed
from merger.errors import ResourceError


@pytest.fixture
def gpus(monkeypatch):
    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


@pytest.mark.parametrize("choice", ["cuda", "auto"])
def test_a_machine_with_gpus_uses_all_of_them(gpus, choice):
    gpus(3)
    assert select_devices(choice) == ("cuda:0", "cuda:1", "cuda:2")


def test_a_number_chooses_one_gpu(gpus):
    gpus(3)
    assert select_devices("cuda:1") == ("cuda:1",)


def test_a_machine_without_gpus_uses_the_cpu(gpus):
    gpus(0)
    assert select_devices("auto") == select_devices("cpu") == ("cpu",)


@pytest.mark.parametrize(
    ("count", "device", "device_count"), [(2, "cuda:3", "2"), (2, "cuda:2", "2"), (0, "cuda", "no")]
)
def test_a_gpu_that_is_not_there_is_told_in_one_line(gpus, count, device, device_count):
    gpus(count)
    with pytest.raises(
        ResourceError, match=f"^device='{device}': this machine has {device_count} CUDA devices"
    ) as refused:
        select_devices(device)
    assert "\n" not in str(refused.value)


def test_there_is_a_worker_for_every_device(gpus, planned, monkeypatch):  # noqa: F811
    gpus(8)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert Machine.of("cuda", None, planned("linear")).workers == 8


def test_there_are_as_many_workers_as_the_free_memory_is_enough_for(monkeypatch, planned):  # noqa: F811
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    merge_plan = planned("tsv_m")
    for free, workers in ((MemoryNeed.of(merge_plan).bytes(8), 8), (MemoryNeed.of(merge_plan).bytes(4), 4), (0, 1)):
        monkeypatch.setattr("merger.engine.machine.free_host_memory", lambda free=free: free)
        assert Machine.of("cpu", None, merge_plan).workers == workers


def test_the_free_memory_is_what_the_system_and_the_control_group_leave(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:       5 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}

    def read(path, *_):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert free_host_memory() == 5 * 1024
    files["/sys/fs/cgroup/memory.max"] = "4096\n"
    assert free_host_memory() == 4096
    files.clear()
    assert free_host_memory() == inf


def together(room, sizes):
    """The most bytes that slices of these sizes have of a room at the same time, a thread for each."""
    lock, reservations, peaks, barrier = Lock(), [], [], Barrier(len(sizes))

    def merge(size):
        barrier.wait()
        with room.reserve(size):
            with lock:
                reservations.append(size)
                peaks.append(sum(reservations))
            sum(range(10_000))
            with lock:
                reservations.remove(size)

    with ThreadPoolExecutor(len(sizes)) as pool:
        list(pool.map(merge, sizes))
    return max(peaks)


def test_matrices_wait_until_the_device_has_room_for_them(monkeypatch):
    monkeypatch.setattr("merger.engine.machine.free_memory", lambda device: 100)
    assert together(Room("cuda:0"), [60, 30, 50, 70, 20, 10] * 3) <= 100


def test_a_matrix_larger_than_the_device_is_merged_alone(monkeypatch):
    monkeypatch.setattr("merger.engine.machine.free_memory", lambda device: 100)
    assert together(Room("cuda:0"), [150, 30, 60]) == 150


def test_a_gpu_has_the_memory_that_is_free_and_what_torch_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 2000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_memory("cuda:0") == pytest.approx(900)  # nine tenths of 1000
    assert free_memory("cpu") == inf


def test_a_merge_on_a_gpu_takes_a_context_but_no_factors_of_host_memory(planned):  # noqa: F811
    merge_plan = planned("tsv_m")
    on_cpu, on_gpu = MemoryNeed.of(merge_plan).bytes(16), MemoryNeed.of(merge_plan, gpu=True).bytes(16)
    assert on_gpu < on_cpu / 2
    assert MemoryNeed.of(merge_plan, gpu=True).bytes(0) - MemoryNeed.of(merge_plan).bytes(0) == CUDA


def test_a_process_does_not_count_the_memory_of_the_one_that_started_it():
    program = "from merger.engine.machine import peak_memory; print(peak_memory())"
    block = bytearray(1 << 28)
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(output) < len(block)


BLOCK = [4096 * 4096] * 4 + [4096 * 11008] * 3 + [4096] * 2  # as a 7B Llama has 32 of


@pytest.mark.parametrize("hands", [1, 2, 3, 4, 7, 8, 9])
def test_matrices_of_a_model_are_dealt_out_evenly(hands):
    owners = assign_sizes(BLOCK * 32, hands)
    shares = [
        sum(size for size, owner in zip(BLOCK * 32, owners, strict=True) if owner == hand) for hand in range(hands)
    ]
    assert max(shares) - min(shares) <= max(BLOCK)
    assert Fraction(max(shares) * hands, sum(shares)) < Fraction(105, 100)


def test_equal_work_goes_round():
    assert assign_sizes([5] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]


def test_a_plan_says_the_devices_where_one_asks(gpus, merger, tmp_path):
    for name in ("base", "code"):
        save_headers(tmp_path / name, {"model.norm.weight": (4,)})
    (tmp_path / "recipe.yaml").write_text("base: base\nexperts: {code: code}\nmethod: linear\noutput: {path: out}\n")
    gpus(2)
    recipe = tmp_path / "recipe.yaml"
    assert "slices are dealt out to cuda:0, cuda:1\n" in merger("plan", recipe, "--device", "cuda").out
    assert json.loads(merger("plan", recipe, "--device", "cuda:1", "--json").out)["devices"] == ["cuda:1"]
    assert json.loads(merger("plan", recipe, "--json").out)["devices"] is None
    refused = merger("plan", recipe, "--device", "cuda:3")
    assert (refused.code, len(refused.err.splitlines())) == (4, 1)
