"""What the machine gives to a merge: device, threads, memory, disk."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from merger.engine import memory as demand
from merger._lazy import torch
from merger.checkpoint.writer import check_output, left_over
from merger.errors import RecipeError, ResourceError
from merger.pipeline.stages import step_rows
from merger.planning.planner import Part, Plan, TensorPlan

SLICE = 1 << 19
"""Elements of one model that are worked on at once: so many that Python's steps for a slice take little beside it.

Compiled code works on pieces of it that fit a core's first cache. It decides no byte of the output, except in the last
bit of float sums over a tensor (slerp's angle, l1 and l2 norms), so it is a constant and not an option.
"""

HOLD = 128 << 20
"""Bytes of one tensor's slices that stay in memory between two questions, unless capped."""


@dataclass(frozen=True)
class Machine:
    """Where the work is done, and how much of it at once."""

    devices: tuple[str, ...]  # slices are dealt out to them by number
    workers: int  # threads that each carry a slice on its whole trip
    hold: int  # bytes of unfinished slices of one tensor that may stay in memory
    hidden: int | None = None  # bytes of hidden states that may; None: all of them

    @classmethod
    def of(cls, device: str, max_memory: int | None, plan: Plan) -> Machine:
        """Settles the device and shares the memory out; ResourceError if it is too little."""
        chosen = chosen_devices(device)
        workers = max(len(chosen), min(os.cpu_count() or 1, 16))
        need = memory_needed(plan, workers)
        if max_memory is None:
            return cls(chosen, workers, HOLD)
        while workers > 1 and need > max_memory:
            workers -= 1
            need = memory_needed(plan, workers)
        if need > max_memory:
            raise ResourceError(
                f"--max-memory: {max_memory:,} bytes are too little; this merge needs about {need:,} at least"
            )
        hidden = (max_memory - need) // 2 if plan.calibrated else 0
        return cls(chosen, workers, min(HOLD, max_memory - need - hidden), hidden)

    @property
    def device(self) -> str:
        """The first device, and the one of what is not dealt out, which is calibration."""
        return self.devices[0]

    def each(self) -> list[Machine]:
        """This machine with each of its devices alone."""
        return [replace(self, devices=(device,)) for device in self.devices]


def dealt(sizes: Iterable[int], hands: int) -> list[int]:
    """Deals work of these sizes out in order, each to the hand that has the least so far: whose each is."""
    held = [0] * hands
    whose = []
    for size in sizes:
        whose.append(held.index(min(held)))
        held[whose[-1]] += size
    return whose


INTERPRETER = 350 << 20  # Python, torch and their threads, as measured on Linux with a CPU build


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


def memory_needed(plan: Plan, workers: int) -> int:
    """Bytes of host memory that the merge takes at least, with so many slices at once."""
    return INTERPRETER + max(demand.while_watching(plan), demand.while_merging(plan) + _at_once(plan, workers))


def _at_once(plan: Plan, workers: int) -> int:
    """What so many slices take together: the largest of any block, or of one where blocks are merged one by one."""
    experts = len(plan.models) - 1
    alone: list[int] = [0]
    by_block: dict[str, list[int]] = {}
    for tensor in plan.tensors:
        sizes = alone if not tensor.gram else by_block.setdefault(tensor.unit, [])
        sizes += (_slice_bytes(tensor, part, experts) for part in tensor.parts)
    return max(workers * max(alone), *(sum(sorted(sizes)[-workers:]) for sizes in by_block.values()), 0)


def bytes_per_element(experts: int) -> int:
    """What one element takes while it is worked on: stored values, deltas, scores, keys and masks."""
    return 12 + experts * 18


def bytes_held(experts: int) -> int:
    """What one element takes between two questions: stored values, base, deltas and scores."""
    return 8 + experts * 12


def _slice_bytes(tensor: TensorPlan, part: Part, experts: int) -> int:
    """What the largest slice takes. A method of whole matrices has float64 copies, factors and Gram matrices beside.

    Of 600 x 1600 and three experts that is 70 (star) to 190 bytes an element (knots, wudi), as measured.
    """
    elements = min(part.rows, slice_rows(tensor, part)) * part.columns
    beside = 0
    if any(stage.takes == "matrix" for stage in tensor.stages):
        beside = 8 * (elements * (experts + 8) + 3 * part.columns**2)
    if tensor.gram:
        beside += (16 + 4 * experts) * part.columns**2
    return elements * bytes_per_element(experts) + beside


def slice_rows(tensor: TensorPlan, part: Part) -> int:
    """Rows of one slice: all of them where a stage needs the whole matrix or another orientation."""
    if part.transposed or not part.columns or any(stage.takes == "matrix" for stage in tensor.stages):
        return max(1, part.rows)
    return step_rows(part.columns, tensor.stages, SLICE)


def chosen_devices(wanted: str) -> tuple[str, ...]:
    """The devices that ``--device`` asks for, as torch calls them; a `MergerError` where there is none such."""
    kind, _, number = wanted.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not number.isdigit()):
        raise RecipeError(f"--device {wanted}: expected auto, cpu, cuda or cuda:0")
    if kind == "cpu":
        return ("cpu",)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        first = ", from cuda:0 on" if count else ""
        raise ResourceError(
            f"--device {wanted}: this machine has {count or 'no'} CUDA devices that torch can use{first}"
        )
    if kind == "cuda" and number:
        return (f"cuda:{int(number)}",)
    return tuple(f"cuda:{i}" for i in range(count)) or ("cpu",)


def check_place(plan: Plan, output: Path, *, force: bool) -> None:
    """RecipeError if the output would take the place of anything that the merge or a person needs."""
    models = plan.models.values()
    inputs = [each.directory for model in models for each in (model, model.adapter) if each is not None]
    check_output(output, inputs, beside=plan.recipe.surroundings(), force=force)


def check_disk(plan: Plan, output: Path) -> None:
    """ResourceError if the output cannot fit the disk it goes to."""
    free = _free(output)
    if plan.bytes_written > free:
        raise ResourceError(f"{output}: needs {plan.bytes_written:,} bytes, but its disk has {free:,} free")


def _free(output: Path) -> int:
    """Bytes of disk that the output may take."""
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    return shutil.disk_usage(there).free + left_over(output)


def peak_memory() -> int:
    """The most resident memory this process has had, in bytes.

    Linux counts in ``ru_maxrss`` what the process that started this one had at that time, but not in VmHWM.
    """
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory(devices: Iterable[str]) -> int:
    """The most that torch has had of one of these GPUs, in bytes; 0 on the CPU."""
    return max(torch.cuda.max_memory_reserved(each) if each.startswith("cuda") else 0 for each in devices)


@contextmanager
def tuned() -> Iterator[None]:
    """Within it torch works on one thread, for slices run side by side and no sum may depend on the cores."""
    _keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Forecast:
    """What a merge would take on this machine."""

    memory: int  # bytes of host memory
    disk_free: int
    passes_over_model: bool  # whether some stage ranks all tensors together, and so reads them again
    kept_grams: int  # bytes of disk that `merger calibrate --gram` would take at most
    devices: tuple[str, ...] | None  # None: nobody asked, and torch need not be loaded


def preview(plan: Plan, output: Path, max_memory: int | None, device: str | None = None) -> Forecast:
    """What a merge would take, with the same refusals as the merge itself; nothing is done."""
    check_place(plan, output, force=True)  # an occupied output is a matter of a flag
    check_disk(plan, output)
    machine = Machine.of(device or "cpu", max_memory, plan)
    ranked = any(tensor.ranked for tensor in plan.tensors)
    hidden = demand.hidden_states(plan)
    memory = memory_needed(plan, machine.workers) + machine.hold
    memory += hidden if machine.hidden is None else min(machine.hidden, hidden)
    return Forecast(memory, _free(output), ranked, demand.kept_grams(plan), machine.devices if device else None)
