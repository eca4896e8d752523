"""A plan's notes on its stages: parameters that have no effect, or another one than is likely meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from merger.planning.plan import TensorPlan


def stage_notes(tensors: Iterable[TensorPlan]) -> Iterable[str]:
    """The distinct notes on the stages of all tensors."""
    examples = {(id(tensor.stages), id(tensor.place)): tensor for tensor in tensors}.values()
    return dict.fromkeys(note for tensor in examples for note in (*_parameter_remarks(tensor), *_idle_weights(tensor)))


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
