"""One slice on its way through the stages of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.ops.arithmetic import uniforms
from merger.ops.questions import Flow
from merger.pipeline.parameters import Place
from merger.pipeline.passes import Sizes, run_slices
from merger.pipeline.registry import supplied
from merger.pipeline.stages import Bound

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What calibration knows of the inputs of one matrix: a value per expert and input feature."""

    second_moment: Tensor | None = None  # [k c]
    mean: Tensor | None = None  # [k c]
    gram: Tensor | None = None  # [k c c]
    token_share: Tensor | None = None  # [k r], for an embedding

    def on(self, device: torch.device) -> Inputs:
        """The same, where a slice is."""
        values = self.second_moment, self.mean, self.gram, self.token_share
        moved = [None if value is None else value.to(device) for value in values]
        return self if all(value is original for value, original in zip(moved, values, strict=True)) else Inputs(*moved)

    @cached_property
    def reached(self) -> Tensor | None:
        """Which experts have inputs to this matrix at all, [k 1]: none, where no token was routed to a packed one."""
        return None if self.second_moment is None else (self.second_moment != 0).any(1, keepdim=True)

    @cached_property
    def judged(self) -> tuple[Tensor | None, Tensor | None]:
        """Second moment and mean [k c], and 1 where no input was ever seen."""
        return _filled(self.second_moment), _filled(self.mean)


def _filled(values: Tensor | None) -> Tensor | None:
    """With 1 for whoever has only zeros."""
    return None if values is None else values.masked_fill(~(values != 0).any(1, keepdim=True), 1)


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
    input_axis: int = -1  # along which the inputs lie here: -1, the columns, or -2, the rows
    inputs: Inputs = field(default_factory=Inputs)


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
        stage_supplies = {**supplies, "deltas": deltas, "inside": partial(_merge_inside, stage.inner, supplies)}
        for name, step in (("scores", stage.score), ("deltas", stage)):
            if step is not None:
                arguments = [stage_supplies[supply] for supply in supplied(step.entry.function)]
                result = step.entry.function(*arguments, **step.values)
                stage_supplies[name] = (yield from result) if inspect.isgenerator(result) else result
        deltas = stage_supplies["deltas"]
        look(i, deltas)
    return deltas


def _merge_inside(stages: Sequence[Bound], supplies: Mapping[str, Any], deltas: Tensor) -> Tensor:
    """Runs an inner method on other task vectors [k r' c], r' <= r: a density is a share of one of them. [r' c]

    A stage with an inner method sees the whole matrix as one slice, so all questions are answered here.
    """
    rows = deltas.shape[1]
    merged: list[Tensor] = []

    def uniform(purpose: str, *, double: bool = False) -> Tensor:
        draws: Tensor = supplies["uniform"](purpose, double=double)
        return draws[:, :rows]

    def carry(_: int) -> Flow[None]:
        merged.append((yield from _run_stages(stages, deltas, {**supplies, "originals": deltas, "uniform": uniform})))

    size = deltas[0].numel()
    run_slices(1, carry, sizes=Sizes(size, size), hold=True)
    return merged[0]


def _supplies(part: Slice, subject: Subject) -> dict[str, Any]:
    """What a stage may ask for by name; the registry's docstring explains each."""
    rows = slice(part.row, part.row + part.base.shape[0])
    inputs = subject.inputs.on(part.base.device)
    second_moment, mean = inputs.judged
    return {
        "base": part.base,
        "originals": part.deltas,
        "uniform": partial(_draw, part, subject),
        "second_moment": _by_feature(second_moment, subject, rows),
        "gram": inputs.gram,
        "mean_input": _by_feature(mean, subject, rows),
        "reached": None if inputs.reached is None else inputs.reached.unsqueeze(-1),
        "token_share": None if inputs.token_share is None else inputs.token_share[:, rows].unsqueeze(-1),
        "kind": subject.kind,
        "experts": subject.place.experts,
    }


def _by_feature(values: Tensor | None, subject: Subject, rows: slice) -> Tensor | None:
    """A value per in-feature as [k 1 c]; [k r 1] where the tensor is stored, and seen, as [in, out]."""
    if values is None:
        return None
    if subject.input_axis == -2:
        return values[:, rows].unsqueeze(-1)
    return values.unsqueeze(1)


def _draw(part: Slice, subject: Subject, purpose: str, *, double: bool = False) -> Tensor:
    """A uniform for every position of the slice, by its place in the stored tensor: [k r c]."""
    rows, columns = part.base.shape
    start = subject.first + part.row * columns
    shape = (columns, rows) if subject.transposed else (rows, columns)  # the stream runs over the stored order
    drawn = torch.stack(
        [
            uniforms(
                (subject.seed, purpose, subject.name, expert), start, *shape, double=double, slice_values=part.base
            )
            for expert in subject.place.experts
        ]
    ).to(part.base.device)
    return drawn.transpose(1, 2) if subject.transposed else drawn
