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
from torch import nn

from merger.calibration import batches
from merger.calibration.block_grams import Drafts, pair_with_expert, together
from merger.calibration.input_fit import check_blocks
from merger.calibration.moment_source import MomentSource
from merger.calibration.statistics import expert_samples
from merger.errors import CheckpointError
from merger.options import RunOptions
from merger.planning.plan import Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.moments import Statistics
    from merger.calibration.paired_blocks import Pair
    from merger.calibration.provider import PartialMerge

BATCH = 1024
"""Tokens of each expert in one step."""
LEARNED = "learned"
"""The input that holds the learned parameters."""


@dataclass(frozen=True)
class Schedule:
    """How a block is learned, as the stage says that takes its weights."""

    steps: int
    rate: float
    weights: Sequence[float]  # by expert

    @classmethod
    def of(cls, tensor: TensorPlan) -> Schedule:
        """The schedule of a tensor's block."""
        values: Mapping[str, Any] = next(
            stage.values for stage in tensor.stages if any(item.name == LEARNED for item in stage.arguments.values())
        )
        return cls(values["steps"], float(values["rate"]), list(map(float, values["weight"])))


def distilled(
    plan: Plan, options: RunOptions, hidden_memory: int | None, merge: PartialMerge
) -> Iterator[tuple[list[TensorPlan], Mapping[str, Statistics], Mapping[str, Tensor]]]:
    """Yields the tensors of each block with its moments and its learned parameters, which are by the output's names.

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
        streams = {
            name: check_blocks(plan, name, pair.blocks(partial(options.progress, f"calibrating {name}")))
            for name, pair in pairs.items()
        }
        for matrices, statistics in together([tensor for tensor in waiting if tensor.is_layer], streams):
            tensors = [*matrices, *_take_block(vectors, {tensor.unit for tensor in matrices})]
            sources = [MomentSource(statistics, "draft_gram", "cross_moment")] if gram else []
            learners = [tensor for tensor in tensors if _learns(tensor) and _is_plain(tensor, pairs)]
            starts = [merge.draft(t.name, sources) if gram else drafts.read(t.name) for t in learners]
            drafts.clear()
            yield tensors, statistics, _learn(learners, starts, pairs, options) if learners else {}
    yield vectors, {}, {}  # those outside the blocks


def _take_block(vectors: list[TensorPlan], units: Collection[str]) -> list[TensorPlan]:
    """Takes the tensors of these blocks out of the list."""
    block = [tensor for tensor in vectors if tensor.unit in units]
    for tensor in block:
        vectors.remove(tensor)
    return block


def _learns(tensor: TensorPlan) -> bool:
    """Whether a tensor of a block takes learned parameters."""
    return not tensor.follows_blocks and any(item.name == LEARNED for item in tensor.inputs)


def _is_plain(tensor: TensorPlan, pairs: Mapping[str, Pair]) -> bool:
    """Whether a tensor is a parameter of every expert's model as it is stored."""
    return all(tensor.reads[name] in pair.student.loader.plain_parameters for name, pair in pairs.items())


def _learn(
    tensors: Sequence[TensorPlan], starts: Sequence[Tensor | None], pairs: Mapping[str, Pair], options: RunOptions
) -> dict[str, Tensor]:
    """The learned parameters of a block by the output's names, float32; they start at these."""
    students = {expert: pair.student for expert, pair in pairs.items()}
    device = next(iter(students.values())).loader.device
    learned = [nn.Parameter(values.to(device, torch.float32, copy=True)) for values in starts if values is not None]
    for expert, pair in pairs.items():
        pair.share({t.reads[expert] or t.name: weights for t, weights in zip(tensors, learned, strict=True)})
    schedule, first = Schedule.of(tensors[0]), next(iter(pairs.values()))
    block, blocks = first.block, len(first.student.block_names)
    optimizer = torch.optim.Adam(learned, lr=schedule.rate)
    for step in range(schedule.steps):
        optimizer.zero_grad()
        for (expert, pair), weight in zip(pairs.items(), schedule.weights, strict=True):
            loss = pair.add_gradient(step % len(students[expert].batches), weight)
            if not isfinite(loss):
                raise CheckpointError(f"{expert}: the loss of a block is no number at step {step + 1}; lower rate")
        optimizer.step()
        options.progress("learning", block * schedule.steps + step + 1, blocks * schedule.steps)
    for pair in pairs.values():
        pair.drop()
    return {tensor.name: weights.detach() for tensor, weights in zip(tensors, learned, strict=True)}
