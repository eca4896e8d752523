"""The memory that a merge takes: slices side by side, and the inputs of its stages."""

from __future__ import annotations

from merger.calibration.provider import block_providers, cost
from merger.pipeline.stages import step_rows
from merger.planning.plan import Part, Plan, TensorPlan

SLICE = 1 << 19
"""Elements of one model that are worked on at once: so many that Python's steps for a slice take little beside it.

Compiled code works on pieces of it that fit a core's first cache. It decides no byte of the output, except in the last
bit of float sums over a tensor (slerp's angle, l1 and l2 norms), so it is a constant and not an option.
"""


HOLD = 128 << 20
"""Bytes of one tensor's slices that stay in memory between two questions, unless capped."""


INTERPRETER = 350 << 20  # Python, torch and their threads, as measured on Linux with a CPU build


def memory_needed(plan: Plan, workers: int) -> int:
    """Bytes of host memory that the merge takes at least, with so many slices at once."""
    inputs = cost(plan)
    return INTERPRETER + max(inputs.making, inputs.merging + _at_once(plan, workers))


def _at_once(plan: Plan, workers: int) -> int:
    """Bytes of so many slices together: the largest of the model, or those of one block that is merged by itself."""
    experts = len(plan.models) - 1
    slices: list[int] = [0]
    by_block: dict[str, list[int]] = {}
    for tensor in plan.tensors:
        sizes = by_block.setdefault(tensor.unit, []) if tensor.lockstep else slices
        sizes += (_slice_bytes(plan, tensor, part, experts) for part in tensor.parts)
    return max(workers * max(slices), *(sum(sorted(sizes)[-workers:]) for sizes in by_block.values()), 0)


def bytes_per_element(experts: int) -> int:
    """What one element takes while it is worked on: stored values, deltas, scores, keys and masks."""
    return 12 + experts * 18


def bytes_held(experts: int) -> int:
    """What one element takes between two questions: stored values, base, deltas and scores."""
    return 8 + experts * 12


def _slice_bytes(plan: Plan, tensor: TensorPlan, part: Part, experts: int) -> int:
    """Bytes of the largest slice. A method of whole matrices has float64 copies, factors and its inputs as well.

    Of 600 x 1600 and three experts that is 70 (star) to 190 bytes an element (knots, wudi), as measured.
    """
    elements = min(part.rows, slice_rows(tensor, part)) * part.columns
    extra = 0
    if any(stage.takes == "matrix" for stage in tensor.stages):
        extra = 8 * (elements * (experts + 8) + 3 * part.columns**2)
    if tensor.lockstep:
        extra += sum(provider.slice_bytes(part, experts) for provider in block_providers(plan))
    return elements * bytes_per_element(experts) + extra


def slice_rows(tensor: TensorPlan, part: Part) -> int:
    """Rows of one slice: all of them where a stage needs the whole matrix or another orientation."""
    if part.transposed or not part.columns or any(stage.takes == "matrix" for stage in tensor.stages):
        return max(1, part.rows)
    return step_rows(part.columns, tensor.stages, SLICE)
