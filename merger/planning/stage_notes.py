"""A plan's notes on its stages: parameters that have no effect, or another one than is likely meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from merger.planning.plan import TensorPlan

LARGE_HEAD = 1 << 27
"""Elements from which on a head is larger than any other matrix of models of its size."""


def stage_notes(tensors: Iterable[TensorPlan]) -> Iterable[str]:
    """The distinct notes on the stages of all tensors."""
    examples = {(id(tensor.stages), id(tensor.place)): tensor for tensor in tensors}.values()
    notes = (
        note
        for tensor in examples
        for note in (*_parameter_remarks(tensor), *_idle_weights(tensor), *_whole_head(tensor))
    )
    return dict.fromkeys(notes)


def _parameter_remarks(tensor: TensorPlan) -> Iterator[str]:
    """The remarks that the stages of a tensor make on their parameters."""
    for stage in tensor.stages:
        remark = stage.entry.remark(len(tensor.place.experts), **stage.values)
        if remark:
            yield f"{stage.entry.name}: {remark}"


def _idle_weights(tensor: TensorPlan) -> Iterator[str]:
    """Says that the experts have weights which no stage of a tensor takes."""
    takes_weight = any("weight" in stage.values for stage in tensor.stages)
    if tensor.stages and not takes_weight and set(tensor.place.weights) != {1}:
        names = ", ".join(dict.fromkeys(stage.entry.name for stage in tensor.stages))
        yield f"{names}: takes no weight, so the experts' own have no effect"


def _whole_head(tensor: TensorPlan) -> Iterator[str]:
    """Says that a large head is in memory whole, and how to merge it slice by slice."""
    names = [stage.entry.name for stage in tensor.stages if stage.values.get("head") and stage.takes == "matrix"]
    if names and tensor.kind in ("head", "tied") and tensor.elements >= LARGE_HEAD:
        yield (
            f"{tensor.name}: {names[0]} merges the head as one matrix, which takes most of the memory; "
            "head: false merges it slice by slice, by the mean"
        )
