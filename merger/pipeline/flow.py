"""One slice on its way through the stages of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from merger.errors import RecipeError, naming
from merger.ops.arithmetic import uniforms
from merger.ops.questions import Flow
from merger.ops.transfer import stack_on_device, to_device
from merger.pipeline.inputs import stage_input
from merger.pipeline.parameters import Place
from merger.pipeline.passes import Sizes, run_slices
from merger.pipeline.registry import Entry, supplied
from merger.pipeline.stages import Bound

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Subject:
    """One tensor as its stages see it: r rows of c columns."""

    name: str
    kind: str
    place: Place
    rows: int
    columns: int
    seed: int = 0
    first: int = 0  # its first element's position in the stored tensor (a slice of packed experts)
    transposed: bool = False  # stored [in, out] and oriented to [out, in] here
    features_are_rows: bool = False  # in-features run along the rows: it is stored, and seen, as [in, out]
    inputs: Mapping[str, Any] = field(default_factory=dict)  # of the whole matrix, by name, as their cuts take them


@dataclass(frozen=True)
class Slice:
    """Some whole rows of a tensor, in float32."""

    row: int
    base: Tensor  # [r c]
    deltas: Tensor  # [k r c]


def unseen(i: int, deltas: Tensor) -> None:
    """Looks at nothing."""


def flow(
    stages: Sequence[Bound], part: Slice, subject: Subject, look: Callable[[int, Tensor], None] = unseen
) -> Flow[Tensor]:
    """Runs the stages on one slice; its result is the merged delta [r c], or what a pack makes, by name.

    ``look`` is shown what stage i leaves, once more each time the flow is started again.
    """
    return _run_stages(stages, part.deltas, _supplies(part, subject), look)


def _run_stages(
    stages: Sequence[Bound],
    deltas: Tensor,
    supplies: Mapping[str, Any],
    look: Callable[[int, Tensor], None] = unseen,
) -> Flow[Tensor]:
    """Runs the stages on deltas [k r c], each on the result of the one before."""
    for i, stage in enumerate(stages):
        stage_supplies = {**supplies, "deltas": deltas, "inside": partial(_run_inner, stage, supplies)}
        for name, step in (("scores", stage.score), ("deltas", stage)):
            if step is not None:
                inputs = {argument: supplies.get(source.name) for argument, source in step.arguments.items()}
                arguments = [inputs.get(supply, stage_supplies.get(supply)) for supply in supplied(step.entry.function)]
                with naming(f"stage {step.entry.name}"):
                    result = step.entry.function(*arguments, **step.values)
                    result = (yield from result) if inspect.isgenerator(result) else result
                _check_result(step.entry, result, deltas.shape)
                stage_supplies[name] = result
        deltas = stage_supplies["deltas"]
        look(i, deltas)
    return deltas


def _check_result(entry: Entry, result: Any, shape: Sequence[int]) -> None:
    """Raises RecipeError where a stage makes no value for each weight of ``shape``, [k r c] or [r c] once merged.

    Compiled loops read and write as many values as they are told.
    """
    expected = list(shape[1:] if entry.kind == "merger" else shape)
    if entry.kind == "pack" or (hasattr(result, "dim") and list(result.shape) == expected):
        return
    found = list(result.shape) if hasattr(result, "dim") else f"a {type(result).__name__}"
    code = entry.function.__code__
    raise RecipeError(
        f"stage {entry.name}: returns {found}, expected a tensor {expected} ({code.co_filename}:{code.co_firstlineno})"
    )


def _run_inner(stage: Bound, supplies: Mapping[str, Any], deltas: Tensor) -> Flow[Tensor]:
    """Runs the inner method of a stage on task vectors [k r c] of the same slice; its result is [r c].

    Where they are of another matrix, in other directions, the stage sees it whole, and all questions are answered here.
    """
    if stage.turns_inner:
        return _run_alone(stage.inner, supplies, deltas)
    merged: Tensor = yield from _run_stages(stage.inner, deltas, {**supplies, "originals": deltas})
    return merged


def _run_alone(stages: Sequence[Bound], supplies: Mapping[str, Any], deltas: Tensor) -> Tensor:
    """Merges task vectors [k r' c'] of a matrix in its directions, r' <= r and c' <= c, to one [r' c'].

    A density is a share of the elements of one of them.
    """
    rows, columns = deltas.shape[1:]
    merged: list[Tensor] = []

    def uniform(purpose: str, *, double: bool = False) -> Tensor:
        draws: Tensor = supplies["uniform"](purpose, double=double)
        return draws[:, :rows, :columns]

    def carry(_: int) -> Flow[None]:
        merged.append((yield from _run_stages(stages, deltas, {**supplies, "originals": deltas, "uniform": uniform})))

    size = deltas[0].numel()
    run_slices(1, carry, sizes=Sizes(size, None), hold=True)
    return merged[0]


def _supplies(part: Slice, subject: Subject) -> dict[str, Any]:
    """What a stage may ask for by name; the registry's docstring explains each."""
    rows = slice(part.row, part.row + part.base.shape[0])
    inputs = {
        name: to_device(stage_input(name).cut(values, rows, subject.features_are_rows), part.base.device)
        for name, values in subject.inputs.items()
    }
    return {
        **inputs,
        "base": part.base,
        "originals": part.deltas,
        "uniform": partial(_draw, part, subject),
        "kind": subject.kind,
        "experts": subject.place.experts,
    }


def _draw(part: Slice, subject: Subject, purpose: str, *, double: bool = False) -> Tensor:
    """A uniform for every position of the slice, by its place in the stored tensor: [k r c]."""
    rows, columns = part.base.shape
    start = subject.first + part.row * columns
    shape = (columns, rows) if subject.transposed else (rows, columns)  # the stream runs over the stored order
    draws = [
        uniforms((subject.seed, purpose, subject.name, expert), start, *shape, double=double, slice_values=part.base)
        for expert in subject.place.experts
    ]
    drawn = stack_on_device(draws, part.base.device)
    return drawn.transpose(1, 2) if subject.transposed else drawn
