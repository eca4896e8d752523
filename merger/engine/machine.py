"""The machine's resources for a merge: device, threads, memory, disk."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from threading import Condition

from merger._lazy import torch
from merger.engine.memory import HOLD, MemoryNeed
from merger.errors import RecipeError, ResourceError
from merger.ops.precision import full_float32
from merger.planning.plan import Plan


@dataclass(frozen=True)
class Machine:
    """Where the work is done, and how much of it at once."""

    devices: tuple[str, ...]  # slices are dealt out to them by number
    workers: int  # threads that each carry a slice on its whole trip
    needed: int  # bytes of host memory that the merge takes at least with so many
    hold: int  # bytes of unfinished slices of one tensor that may stay in memory
    hidden_memory: int | None = None  # bytes of hidden states that may; None: all of them
    rooms: Mapping[str, Room] = field(default_factory=dict, compare=False)  # by device

    @classmethod
    def of(cls, device: str, max_memory: int | None, plan: Plan) -> Machine:
        """Chooses the devices and divides the memory; raises ResourceError if less is allowed than a merge needs.

        Without a limit there are only so many threads as the free memory is enough for, but one at least.
        """
        devices = select_devices(device)
        workers = max(len(devices), min(os.cpu_count() or 1, 16))
        need = MemoryNeed.of(plan, gpu=devices != ("cpu",))
        limit = free_host_memory() if max_memory is None else max_memory
        while workers > 1 and need.bytes(workers) > limit:
            workers -= 1
        needed = need.bytes(workers)
        rooms = {device: Room(device) for device in devices}
        if max_memory is None:
            return cls(devices, workers, needed, HOLD, rooms=rooms)
        if needed > max_memory:
            raise ResourceError(
                f"max_memory=SIZE: {max_memory:,} bytes are too little; this merge needs about {needed:,} at least"
            )
        hidden_memory = (max_memory - needed) // 2 if plan.inputs else 0
        hold = min(HOLD, max_memory - needed - hidden_memory)
        return cls(devices, workers, needed, hold, hidden_memory, rooms)

    @property
    def device(self) -> str:
        """The first device, which also runs calibration."""
        return self.devices[0]

    def per_device(self) -> list[Machine]:
        """This machine with each of its devices alone."""
        return [replace(self, devices=(device,)) for device in self.devices]


class Room:
    """A device's memory, of which whole matrices take a part each while they are merged there."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._size, self._reserved = 0.0, 0
        self._changed = Condition()

    @contextmanager
    def reserve(self, size: int) -> Iterator[None]:
        """Waits until ``size`` bytes are free and reserves them; a size above the device's memory is reserved alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._has(size))
            self._reserved += size
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= size
                self._changed.notify_all()

    def _has(self, size: int) -> bool:
        if not self._reserved:
            self._size = free_memory(self._device)
            return True
        return self._reserved + size <= self._size


USABLE = 0.9
"""Share of a GPU's free memory that matrices may take: the rest is for workspaces of cuSOLVER and for gaps."""


def free_memory(device: str) -> float:
    """Bytes of a GPU that no process has, or that torch holds here and does not use; of the CPU's as many as one likes.

    On the CPU the number of workers is the limit.
    """
    if not device.startswith("cuda"):
        return inf
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return USABLE * (free + unused)


def free_host_memory() -> float:
    """Bytes of host memory that a process may still take: what Linux says is available, within its control group.

    Infinite where the system does not say.
    """
    sizes = [inf]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes.append(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024)
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no limit
            sizes.append(int(Path(file).read_text()))
    return min(sizes)


def assign_sizes(sizes: Iterable[int], hands: int) -> list[int]:
    """Assigns sizes in order to the least loaded of ``hands`` workers; returns the worker of each size."""
    loads = [0] * hands
    assignment = []
    for size in sizes:
        assignment.append(loads.index(min(loads)))
        loads[assignment[-1]] += size
    return assignment


def _keep_freed_memory() -> None:
    """Asks glibc to reuse a slice's memory instead of handing it back after every operation.

    Measured on the 1.1B linear merge: 26 s of system time without it, 9 s with it. All threads share one
    arena, because the others give their memory back whenever they are empty. Elsewhere than on glibc
    there is no such knob, and nothing happens.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 32 << 20)
        mallopt(arena_max, 1)


def select_devices(choice: str) -> tuple[str, ...]:
    """Returns torch's names of the devices that ``--device`` selects; raises `MergerError` if there is none."""
    kind, _, number = choice.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not number.isdigit()):
        raise RecipeError(f"device={choice!r}: expected auto, cpu, cuda or cuda:0")
    if kind == "cpu":
        return ("cpu",)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        first = ", from cuda:0 on" if count else ""
        raise ResourceError(
            f"device={choice!r}: this machine has {count or 'no'} CUDA devices that torch can use{first}"
        )
    if kind == "cuda" and number:
        return (f"cuda:{int(number)}",)
    return tuple(f"cuda:{i}" for i in range(count)) or ("cpu",)


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes.

    Linux counts in ``ru_maxrss`` what the process that started this one had at that time, but not in VmHWM, which
    some sandboxes do not show.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory(devices: Iterable[str]) -> int:
    """Returns the peak memory that torch reserved on one of these GPUs, in bytes; 0 on the CPU."""
    return max(torch.cuda.max_memory_reserved(device) if device.startswith("cuda") else 0 for device in devices)


@contextmanager
def tuned() -> Iterator[None]:
    """Limits torch to one thread and disables TF32: slices run in parallel, and no sum may depend on the cores."""
    _keep_freed_memory()
    thread_count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with full_float32():
            yield
    finally:
        torch.set_num_threads(thread_count)
