"""Learning a block's parameters: a few steps of gradient descent towards the experts' outputs of the block.

The blocks before are merged already, so that the block learns to answer on what will enter it, and each step takes one
batch of every expert's text. See docs/methods/regression.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch

from merger.calibration import batches
from merger.calibration.block_grams import Drafts, pair_blocks, pair_with_expert, together
from merger.calibration.learned_values import COEFFICIENTS, WEIGHTS, LearnedCoefficients, LearnedWeights
from merger.calibration.moment_source import MomentSource
from merger.calibration.statistics import expert_samples
from merger.errors import CheckpointError, RecipeError
from merger.options import RunOptions
from merger.planning.plan import Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.moments import Statistics
    from merger.calibration.paired_blocks import Pair
    from merger.calibration.provider import MergedTensors, PartialMerge

BATCH = 1024
"""Tokens of each expert in one step."""
_LEARNED = {WEIGHTS, COEFFICIENTS}


@dataclass(frozen=True)
class Schedule:
    """How a block is learned, as the stage says that takes its weights."""

    steps: int
    rate: float
    weights: tuple[float, ...]  # by expert

    @classmethod
    def of(cls, tensor: TensorPlan) -> Schedule:
        """The schedule of a tensor's block."""
        values: Mapping[str, Any] = next(stage.values for stage in tensor.stages if _LEARNED & stage.arguments.keys())
        return cls(values["steps"], float(values["rate"]), tuple(map(float, values["weight"])))


def distilled(
    plan: Plan, options: RunOptions, hidden_memory: int | None, merge: PartialMerge
) -> Iterator[tuple[list[TensorPlan], Mapping[str, Statistics], Mapping[str, Tensor]]]:
    """Yields the tensors of each block with its moments and what is learned of it, by the output's names.

    Learning starts at what the stages make of the block with its moments. A tensor that transformers loads together
    with others, such as a packed expert, is not learned. Raises as `calibrate` does, and CheckpointError where a loss
    is no number.
    """
    waiting = [tensor for tensor in plan.tensors if tensor.lockstep]
    vectors = [tensor for tensor in waiting if not tensor.is_layer]
    drafts = Drafts(merge, {tensor.name for tensor in waiting if tensor.follows_blocks})
    gram = any(item.name == "draft_gram" for item in plan.inputs)
    memory = hidden_memory and hidden_memory // len(plan.recipe.experts)
    with ExitStack() as stack:
        pairs = {}
        for name in plan.recipe.experts if waiting else ():
            key, samples = expert_samples(plan, name, options)
            text = batches(samples.tokens, BATCH)
            arguments = plan, name, text, key.settings, options, memory, drafts
            pairs[name] = stack.enter_context(pair_with_expert(*arguments, gram=gram, dtype=torch.float32))
        streams = {name: pair_blocks(plan, name, pair, options) for name, pair in pairs.items()}
        for matrices, statistics in together([tensor for tensor in waiting if tensor.is_layer], streams):
            tensors = [*matrices, *_take_block(vectors, {tensor.unit for tensor in matrices})]
            sources = [MomentSource(statistics, "draft_gram", "cross_moment")] if gram else []
            learners = [tensor for tensor in tensors if _learns(tensor) and _is_plain(tensor, pairs)]
            read_start = partial(merge.draft, sources=sources) if gram else drafts.read
            learned = {tensor.name: _learned(plan, tensor, read_start, pairs) for tensor in learners}
            drafts.clear()
            if learners:
                _learn(learners, learned, pairs, options)
            yield tensors, statistics, {name: item.values.detach() for name, item in learned.items()}
    yield vectors, {name: {} for name in plan.recipe.experts}, {}  # those outside the blocks


def _take_block(vectors: list[TensorPlan], units: Collection[str]) -> list[TensorPlan]:
    """Takes the tensors of these blocks out of the list."""
    block = [tensor for tensor in vectors if tensor.unit in units]
    for tensor in block:
        vectors.remove(tensor)
    return block


def _learns(tensor: TensorPlan) -> bool:
    """Whether a tensor of a block takes what is learned; packed experts are not learned."""
    takes = any(item.name in _LEARNED for item in tensor.inputs)
    return takes and not tensor.follows_blocks and len(tensor.parts) == 1


def _is_plain(tensor: TensorPlan, pairs: Mapping[str, Pair]) -> bool:
    """Whether a tensor is a parameter of every expert's model as it is stored."""
    return all(tensor.reads[name] in pair.student.loader.plain_parameters for name, pair in pairs.items())


def _learned(
    plan: Plan, tensor: TensorPlan, read_start: MergedTensors, pairs: Mapping[str, Pair]
) -> LearnedWeights | LearnedCoefficients:
    """What the stages of a tensor take of it, as it is before the first step."""
    device = next(iter(pairs.values())).student.loader.device
    if any(item.name == COEFFICIENTS for item in tensor.inputs):
        return LearnedCoefficients.of(plan, tensor, device)
    start = read_start(tensor.name)
    assert start is not None, "a tensor that waits for its block has a draft"
    return LearnedWeights(start.to(device, torch.float32, copy=True))


def _learn(
    tensors: Sequence[TensorPlan], learned: Mapping[str, LearnedWeights], pairs: Mapping[str, Pair], options: RunOptions
) -> None:
    """Takes the steps of a block, on the weights that all experts' models share."""
    for expert, pair in pairs.items():
        pair.share({tensor.reads[expert] or "": learned[tensor.name].weights for tensor in tensors})
    schedules, first = {Schedule.of(tensor) for tensor in tensors}, next(iter(pairs.values()))
    if len(schedules) > 1:
        raise RecipeError(
            f"{tensors[0].unit}: its tensors are learned together, so all rules for them must give the same steps, "
            "rate and weight"
        )
    (schedule,) = schedules
    block, blocks = first.block, len(first.student.block_names)
    optimizer = torch.optim.Adam([item.values for item in learned.values()], lr=schedule.rate)
    for step in range(schedule.steps):
        optimizer.zero_grad()
        for (expert, pair), weight in zip(pairs.items(), schedule.weights, strict=True):
            loss = pair.add_gradient(step % len(pair.student.batches), weight)
            if not isfinite(loss):
                raise CheckpointError(f"{expert}: the loss of a block is no number at step {step + 1}; lower rate")
        for item in learned.values():
            item.pull_gradient()
        optimizer.step()
        for item in learned.values():
            item.push_values()
        options.progress("learning", block * schedule.steps + step + 1, blocks * schedule.steps)
    for pair in pairs.values():
        pair.drop()
