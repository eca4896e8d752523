"""Whether the inputs that calibration saw fit the matrices that a plan will judge by them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping

from merger.calibration.moments import Moments
from merger.checkpoint.packed_experts import COLUMNS, ROWS
from merger.errors import CheckpointError
from merger.planning.plan import Plan, TensorPlan

_AXES = {COLUMNS: "columns", ROWS: "rows", 0: "rows and columns"}


def judged_tensors(plan: Plan, expert: str) -> dict[str, TensorPlan]:
    """The tensors that some stage judges by the inputs of a layer, by the expert's own names of them."""
    takers = (tensor for tensor in plan.tensors if tensor.inputs and tensor.is_layer and tensor.parts)
    return {name: tensor for tensor in takers if (name := tensor.reads.get(expert)) is not None}


def check_inputs(plan: Plan, expert: str, statistics: Mapping[str, Moments]) -> None:
    """Raises CheckpointError naming a tensor whose inputs have another axis, or another size, than the plan says."""
    for name, tensor in judged_tensors(plan, expert).items():
        if name in statistics:
            _check_tensor(tensor, f"{expert}: {name}", statistics[name])


def check_blocks(
    plan: Plan, expert: str, blocks: Iterator[tuple[str, dict[str, Moments]]]
) -> Generator[tuple[str, dict[str, Moments]], None, None]:
    """Yields the statistics block by block; checks those of a block as `check_inputs` does."""
    tensors = judged_tensors(plan, expert)
    for unit, statistics in blocks:
        for name in tensors.keys() & statistics.keys():
            _check_tensor(tensors[name], f"{expert}: {name}", statistics[name])
        yield unit, statistics


def _check_tensor(tensor: TensorPlan, label: str, moments: Moments) -> None:
    if moments.second_moment is None:  # no input was seen
        return
    part = tensor.parts[0]
    axis = ROWS if part.transposed else part.input_axis
    expected = (*((len(tensor.parts),) if tensor.kind == "expert3d" else ()), part.features)
    if tuple(moments.second_moment.shape) == expected and moments.axis in (None, axis):
        return
    observed_axis = "" if moments.axis is None else f" along its {_AXES[moments.axis]}"
    raise CheckpointError(
        f"{label} {list(tensor.info.shape)}: the model multiplies it by inputs of {moments.second_moment.shape[-1]} "
        f"features{observed_axis}, but by its name and shape they should be {part.features} along its {_AXES[axis]}; "
        "keep it with a rule {tensors: REGEX, use: base}, or merge it by a method that looks at no inputs"
    )
