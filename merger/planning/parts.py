"""The matrices of a stored tensor, one by one, and the way round in which stages see them."""

from __future__ import annotations

from collections.abc import Sequence

from merger.checkpoint.packed_experts import COLUMNS, ROWS
from merger.checkpoint.tensor_info import rows_and_columns
from merger.pipeline.stages import Bound
from merger.planning.plan import Part


def parts_of(
    name: str, kind: str, shape: tuple[int, ...], input_axis: int | None, stages: Sequence[Bound]
) -> tuple[Part, ...]:
    """All of a tensor as one part, or one part for each of packed experts.

    Matrices stored [in, out] are turned for stages that look at more than a slice, as rows are output neurons to them.
    """
    rows, columns = shape[1:] if kind == "expert3d" else rows_and_columns(shape)
    turned = input_axis == ROWS and any(stage.takes != "slice" for stage in stages)
    size = (columns, rows) if turned else (rows, columns)
    axis = COLUMNS if turned or input_axis is None else input_axis
    if kind != "expert3d":
        return (Part(name, 0, *size, transposed=turned, input_axis=axis),)
    return tuple(
        Part(f"{name}[{expert}]", expert * rows, *size, transposed=turned, input_axis=axis)
        for expert in range(shape[0])
    )


def needs_input_axis(stages: Sequence[Bound]) -> str | None:
    """The first stage that must know which axis of a matrix is the input, because it looks at rows or at inputs."""
    return next((stage.entry.name for stage in stages if stage.takes != "slice" or stage.inputs), None)


def describe_unknown_axes(names: Sequence[str], stage: str) -> str:
    """Returns the fault of packed experts whose orientation is unknown to a stage that needs it."""
    remainder = f" and of {len(names) - 1} more packed experts" if names[1:] else ""
    return (
        f"{names[0]}: no shape shows whether its matrices{remainder} are stored [in, out] or [out, in], which "
        f"{stage} must know; "
        "add a rule that keeps them, {tensors: REGEX, use: base}, or one that merges them by a method that looks "
        "at neither rows nor inputs, {tensors: REGEX, method: ties}"
    )
