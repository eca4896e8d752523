"""Inputs of stages that are made outside the pipeline, such as statistics of a layer's inputs from calibration text.

A stage takes an input by naming it before the ``*`` of its signature. Each input has one provider, which declares it
here and makes it (`merger.calibration.providers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from merger.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor

SLICE_SUPPLIES = frozenset(
    {"deltas", "originals", "base", "scores", "inside", "uniform", "kind", "experts"}
)  # the names before the `*` that the flow of a slice supplies itself
PROVIDERS = "merger.calibration.providers"
"""The package whose import declares the inputs that come with merger."""

Granularity = Literal["model", "block"]
"""When an input exists: for the whole model before the merge, or for one block at a time in lockstep with it."""
Stream = Literal["own", "merged", "draft"]
"""The models that an expert's text goes through: the expert; the expert's block behind the merged blocks; or the block
as its stages draft it, behind the merged blocks, beside the expert."""
Cut = Callable[[Any, slice, bool], "Tensor"]
"""Takes an input of a whole matrix, a tensor or what its provider reads slices from, the rows of a slice, and whether
in-features run along these rows; returns the slice's part, in a shape that broadcasts with deltas [k r c]."""


@dataclass(frozen=True)
class StageInput:
    """One input of stages."""

    name: str
    granularity: Granularity
    cut: Cut
    needs_text: bool = True  # whether it is made from the recipe's calibration text
    stream: Stream = "own"  # the models that text goes through
    needs_gradients: bool = False  # whether backward passes make it
    of_task_vectors: bool = False  # whether it was learned of them as they are before the first stage

    @property
    def follows_merge(self) -> bool:
        """Whether it depends on the blocks merged so far, so that no file can hold it."""
        return self.stream != "own"


INPUTS: dict[str, StageInput] = {}
"""All declared inputs, by name."""


def declare(*inputs: StageInput) -> None:
    """Declares inputs of stages."""
    for stage_input in inputs:
        assert stage_input.name not in INPUTS, f"two providers declare {stage_input.name}"
        INPUTS[stage_input.name] = stage_input


def declared_inputs() -> Mapping[str, StageInput]:
    """All declared inputs, by name, with those that come with merger."""
    import_module(PROVIDERS)
    return INPUTS


def stage_input(name: str) -> StageInput:
    """Returns a declared input; raises ValueError with the nearest name if there is none."""
    if name not in INPUTS and name not in declared_inputs():
        suggestion = nearest(name, [*SLICE_SUPPLIES, *INPUTS])
        raise ValueError(f"nothing supplies {name!r}, which stands before the * of a stage; {suggestion}")
    return INPUTS[name]


# --- parts of an input that belong to a slice -----------------------------------------------------


def by_feature(values: Tensor, rows: slice, features_are_rows: bool) -> Tensor:
    """A value for each in-feature, [k c]: returns [k 1 c], or [k r 1] where in-features run along the rows."""
    return values[:, rows].unsqueeze(-1) if features_are_rows else values.unsqueeze(1)


def by_row(values: Tensor, rows: slice, features_are_rows: bool) -> Tensor:
    """A value for each row, [k r]: returns [k r 1]."""
    return values[:, rows].unsqueeze(-1)


def by_matrix_row(values: Tensor, rows: slice, features_are_rows: bool) -> Tensor:
    """A value for each element, [r c]: returns the slice's rows."""
    return values[rows]


def by_coefficient_row(values: Tensor, rows: slice, features_are_rows: bool) -> Tensor:
    """Coefficients of each expert's elements [k r c], of its rows [k r 1] or of it all [k 1 1]: the slice's own."""
    return values if values.shape[1] == 1 else values[:, rows]


def by_expert(values: Tensor, rows: slice, features_are_rows: bool) -> Tensor:
    """A value for each expert, [k 1]: returns [k 1 1]."""
    return values.unsqueeze(-1)


def uncut(values: Tensor, rows: slice, features_are_rows: bool) -> Tensor:
    """The input of the whole matrix, as it is."""
    return values
