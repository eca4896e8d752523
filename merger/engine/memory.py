"""The memory that a merge takes: slices side by side, and the inputs of its stages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from merger.calibration.provider import Cost, cost, input_bytes
from merger.pipeline.stages import slice_height
from merger.planning.plan import Part, Plan, TensorPlan

SLICE = 1 << 19
"""Elements of one model that are worked on at once: so many that Python's steps for a slice take little beside it.

Compiled code works on pieces of it that fit a core's first cache. It decides no byte of the output, except in the last
bit of float sums over a tensor (slerp's angle, l1 and l2 norms), so it is a constant and not an option.
"""


FEW = 8
"""Experts up to which a slice has all its elements; with more it has fewer, so that memory does not grow with them."""

HOLD = 128 << 20
"""Bytes of one tensor's slices that stay in memory between two questions, unless capped."""


INTERPRETER = 350 << 20  # Python, torch and their threads, as measured on Linux with a CPU build

CUDA = 1 << 30
"""Host memory that a process takes beside `INTERPRETER` once it computes on GPUs, all of them together.

The libraries of torch 2.11 for CUDA 13 take 270 MB more than those for the CPU, as measured without a device; contexts,
cuBLAS and cuSOLVER are an estimate, which scripts/gpu_check.sh checks.
"""


@dataclass(frozen=True)
class MemoryNeed:
    """The host memory that a merge takes at least, in bytes, by how many slices are merged at once."""

    process: int
    inputs: Cost
    groups: Sequence[Mapping[int, int]]  # how many slices of each size there are, of those that may meet

    @classmethod
    def of(cls, plan: Plan, *, gpu: bool = False) -> MemoryNeed:
        """The need of a plan whose slices are merged on the CPU or on GPUs."""
        size = _staged_bytes if gpu else slice_bytes
        return cls(INTERPRETER + (CUDA if gpu else 0), cost(plan), list(_groups(plan, size)))

    def bytes(self, workers: int) -> int:
        """The need with so many threads, of which each has a slice."""
        slices = max((_largest(sizes, workers) for sizes in self.groups), default=0)
        return self.process + max(self.inputs.making, self.inputs.merging + slices)


MANY = 1 << 16
"""More slices than are ever merged at once, as a part of several has."""


def _groups(plan: Plan, size: Callable[[Plan, TensorPlan, Part], int]) -> Iterator[Mapping[int, int]]:
    """The numbers of slices by size: those of each block merged in lockstep, and those that wait for none."""
    in_lockstep = {id(tensor.stages) for tensor in plan.stage_examples if tensor.lockstep}
    kinds: dict[str, Counter[tuple[int, int, int]]] = defaultdict(Counter)  # by block
    examples: dict[tuple[int, int, int], tuple[TensorPlan, Part]] = {}
    for tensor in plan.tensors:
        block = tensor.unit if id(tensor.stages) in in_lockstep else ""
        for part in tensor.parts:
            kind = id(tensor.stages), part.rows, part.columns
            kinds[block][kind] += 1
            examples[kind] = tensor, part
    sizes = {kind: size(plan, *example) for kind, example in examples.items()}
    for counts in kinds.values():
        slices = Counter[int]()
        for kind, count in counts.items():
            slices[sizes[kind]] += MANY if is_cut(*examples[kind]) else count
        yield slices


def _largest(counts: Mapping[int, int], number: int) -> int:
    """The sum of the largest ``number`` sizes, given how many there are of each."""
    total = 0
    for size, count in sorted(counts.items(), reverse=True):
        taken = min(count, number)
        total, number = total + size * taken, number - taken
    return total


def bytes_per_element(experts: int) -> int:
    """Returns the bytes of one element during a merge: stored values, deltas, scores, keys and masks."""
    return 12 + experts * 18


def bytes_held(experts: int) -> int:
    """Returns the bytes of one element between two questions: stored values, base, deltas and scores."""
    return 8 + experts * 12


def slice_bytes(plan: Plan, tensor: TensorPlan, part: Part) -> int:
    """Bytes that the largest slice takes where it is merged, on the CPU or a device.

    A method of whole matrices has float64 copies, factors and its inputs as well. Of 600 x 1600 and three experts that
    is 70 (star) to 190 bytes an element (knots, wudi), as measured on the CPU.
    """
    elements, experts = _slice_elements(tensor, part), len(plan.models) - 1
    extra = 0
    if not is_sliced(tensor):
        extra = 8 * (elements * (experts + 8) + (3 + _sums(tensor, part, experts)) * part.columns**2)
    extra += input_bytes(tensor, part, experts)
    return elements * bytes_per_element(experts) + extra


def _sums(tensor: TensorPlan, part: Part, experts: int) -> int:
    """The sums over rows, each as large as the square of the columns, that stages ask for: an expert's, and one more.

    Stages with inputs have their sums in these, and wide matrices are whole. A matrix that is cut has one run's beside
    those of all.
    """
    if part.rows <= part.columns:
        return 0
    stages = (stage for outer in tensor.stages for stage in outer.parts)
    asking = sum(stage.entry.takes(**stage.values) == "runs" and not stage.arguments for stage in stages)
    return (asking + (asking > 0 and is_cut(tensor, part))) * (experts + 1)


def _staged_bytes(plan: Plan, tensor: TensorPlan, part: Part) -> int:
    """Returns the host memory of a slice that is merged on a device: its inputs, random draws and results.

    Twice that, for torch rounds pinned allocations up to powers of two. Random draws are of slices alone.
    """
    experts = len(plan.models) - 1
    staged = bytes_per_element(experts) if is_sliced(tensor) else 8 + 8 * experts  # float32, and an adapter's changes
    return 2 * staged * _slice_elements(tensor, part)


def _slice_elements(tensor: TensorPlan, part: Part) -> int:
    return min(part.rows, slice_rows(tensor, part)) * part.columns


def is_cut(tensor: TensorPlan, part: Part) -> bool:
    """Whether a part is merged in more than one slice."""
    return slice_rows(tensor, part) < part.rows


def is_sliced(tensor: TensorPlan) -> bool:
    """Whether no stage must see a whole matrix, or a long run of its rows."""
    return all(stage.takes not in ("runs", "matrix") for stage in tensor.stages)


def slice_rows(tensor: TensorPlan, part: Part) -> int:
    """Rows of one slice: all of them where a stage needs the whole matrix or another orientation."""
    if part.transposed:
        return max(1, part.rows)
    elements = SLICE * FEW // max(FEW, len(tensor.place.experts))
    return slice_height(part.rows, part.columns, tensor.stages, elements)
