"""A pipeline of stages, applied to one tensor slice by slice: stages in, one merged delta out.

Every slice runs the same flow. Where a flow asks about the whole tensor, the question goes to all
slices, their parts are put together, and every flow goes on with the answer: those that were held
in memory from where they stopped, the others from the start, with the answers so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, get_args

from merger.errors import naming
from merger.pipeline.inputs import StageInput, stage_input
from merger.pipeline.parameters import Place, resolve, turns
from merger.pipeline.registry import (
    Entry,
    Form,
    Nested,
    Stage,
    Takes,
    entry_of,
    nested_parameter,
    parameters,
    supplied,
)

if TYPE_CHECKING:
    from torch import Tensor


KINDS = ("linear", "conv1d", "expert3d", "head", "tied", "embedding", "vector", "other")
"""All kinds of tensors."""

# --- stages ---------------------------------------------------------------------------------------


def expand(stage: Stage, kind: str, experts: Sequence[str]) -> list[Stage]:
    """The stages of a named method for a tensor of this kind; a stage is a pipeline of itself or of what it names."""
    entry = entry_of(stage.func)
    with naming(f"stage {entry.name}"):
        stages: list[Stage] | None = entry.elsewhere(kind, **stage.keywords)
        if stages is None and entry.kind != "method":
            return [stage]
        if stages is None:
            supplies = {"kind": kind, "experts": tuple(experts)}
            stages = stage(**{name: supplies[name] for name in supplied(stage.func)})
    return [inner_stage for stage in stages for inner_stage in expand(stage, kind, experts)]


def entries_of(stage: Stage, experts: Sequence[str]) -> set[Entry]:
    """The entries of a stage, of its score and inner method, and of what it expands to for any kind of tensor."""
    nested = [value for value in stage.keywords.values() if isinstance(value, partial)]
    expanded = [inner for kind in KINDS for inner in expand(stage, kind, experts) if inner.func is not stage.func]
    return {entry_of(stage.func)}.union(*(entries_of(inner, experts) for inner in (*nested, *expanded)))


@dataclass(frozen=True)
class Bound:
    """A stage with its parameters settled for one tensor."""

    entry: Entry
    values: dict[str, Any]
    score: Bound | None = None
    inner: tuple[Bound, ...] = ()

    @cached_property
    def takes(self) -> Takes:
        """The least that this stage and its inner method must see at once."""
        own: Takes = self.entry.takes(**self.values)
        return max((own, *(stage.takes for stage in self.inner)), key=get_args(Takes).index)

    @property
    def turns_inner(self) -> bool:
        """Whether its inner method merges task vectors in other directions than the base's."""
        nested = nested_parameter(self.entry.function)
        return nested is not None and nested[1].turned

    @cached_property
    def parts(self) -> tuple[Bound, ...]:
        """This stage, its score, and the stages that run inside it."""
        nested = (*self.inner, *(() if self.score is None else (self.score,)))
        return (self, *(part for stage in nested for part in stage.parts))

    @cached_property
    def arguments(self) -> Mapping[str, StageInput]:
        """The inputs of this stage alone, by the argument that takes each."""
        return {name: stage_input(source) for name, source in self.entry.input_names(**self.values).items()}

    @cached_property
    def inputs(self) -> frozenset[StageInput]:
        """The inputs of this stage, of its score and of its inner method."""
        return frozenset(item for part in self.parts for item in part.arguments.values())

    @property
    def claims(self) -> Sequence[Fraction]:
        """The share of a tensor that each expert claims whether or not it changed it; empty where none does."""
        return self.entry.claims(**self.values)

    @cached_property
    def align(self) -> int:
        """The number of elements that every slice must begin at a multiple of."""
        multiple = int(self.values[self.entry.align]) if self.entry.align else 1
        return math.lcm(multiple, 8) if self.entry.packing else multiple  # bits are stored by the byte

    def forms(self, rows: int, columns: int) -> dict[str, Form]:
        """How the results of this stage, a pack, are stored for a matrix of this size."""
        assert self.entry.packing is not None, "it is a pack"
        return self.entry.packing.forms(rows=rows, columns=columns, **self.values)


def rebuilt(packed: Bound, results: Mapping[str, Tensor], expert: int) -> Tensor:
    """The task vector [r c] that a pack's results hold of one expert."""
    assert packed.entry.packing is not None, "it is a pack"
    forms = packed.forms(0, 0)
    expert_results = {name: value if forms[name].shared else value[expert] for name, value in results.items()}
    return packed.entry.packing.unpack(**expert_results)


def bind(stage: Stage, place: Place) -> Bound:
    """Settles a stage's parameters for the tensor at ``place``; ValueError if they exclude each other.

    An expert's own weight multiplies the `weight` that a merger is given for it.
    """
    entry = entry_of(stage.func)
    values = {}
    for name, (annotation, _) in parameters(stage.func).items():
        try:
            values[name] = resolve(annotation, stage.keywords[name], place)
        except ValueError as error:
            raise ValueError(f"{name.rstrip('_')}: {error}") from None
    if values.get("scope") == "global" and any(turns(value) for value in stage.keywords.values()):
        raise ValueError("scope: global ranks the whole model at once, so no order can rotate; list it")
    if "weight" in values and place.weights:
        values["weight"] = [w * expert_weight for w, expert_weight in zip(values["weight"], place.weights, strict=True)]
    if entry.check is not None:
        entry.check(**values)
    score = values.pop("score", None)
    score = None if score is None else bind(score, place)
    if score is not None and score.inputs and values.get("scope") == "global":
        raise ValueError(
            f"scope: global ranks the whole model at once, but {score.entry.name} depends on a layer's own inputs, "
            "so its scores of different tensors share no scale; write scope: tensor"
        )
    nested = nested_parameter(entry.function)
    inner = () if nested is None else _bind_nested(*nested, values.pop(nested[0]), place)
    bound = Bound(entry, values, score, inner)
    _ = bound.arguments  # raises ValueError for a name before the `*` that nothing supplies
    return bound


def _bind_nested(parameter: str, nested: Nested, method: Stage, place: Place) -> tuple[Bound, ...]:
    """The stages of a method that runs inside another on a whole matrix; ValueError if one cannot."""
    stages = tuple(bind(stage, place) for stage in expand(method, "linear", place.experts))
    for stage in stages:
        name = stage.entry.name
        if stage.entry.packing is not None:
            raise ValueError(f"{parameter}: {name} makes more than one model, and one is needed here")
        if nested.turned and "base" in supplied(stage.entry.function):
            raise ValueError(
                f"{parameter}: {name} looks at the base's weights, which are not among the directions of the "
                "task vectors; mean, sum or ties do not"
            )
        if not nested.has_features and stage.inputs:
            raise ValueError(
                f"{parameter}: {name} looks at layer inputs, which are not among the directions of the task vectors; "
                "mean, sum or ties do not"
            )
        if stage.values.get("scope") == "global":
            raise ValueError(
                f"{parameter}: scope: global ranks the whole model at once, but {name} sees one matrix here; "
                "write scope: tensor"
            )
    return stages


RUN = 16
"""Slices that a run of rows is as large as, if it has at least as many rows as columns: its sums are no larger then."""


def slice_height(rows: int, columns: int, stages: Sequence[Bound], elements: int) -> int:
    """The rows of a matrix that its stages see at once, of about ``elements`` where any slice will do."""
    takes = {stage.takes for stage in stages}
    if not columns or "matrix" in takes:
        return max(1, rows)
    if "runs" in takes:
        run = max(columns, RUN * elements // columns)
        return run if rows > 4 * run else max(1, rows)  # as a head has, and no other matrix of most models
    return step_rows(columns, stages, elements)


def step_rows(columns: int, stages: Sequence[Bound], elements: int) -> int:
    """How many whole rows of a tensor make a slice of about ``elements`` that starts where stages allow."""
    align = math.lcm(*(stage.align for stage in stages))
    unit = align // math.gcd(align, columns)
    return max(1, elements // (columns * unit)) * unit
