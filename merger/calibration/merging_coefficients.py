"""Coefficients of task vectors, learned by gradients through the merged model, one block in memory at a time.

AdaMerging, https://arxiv.org/abs/2310.02575, section 3.2. The gradient of a coefficient is that of the tensor times the
task vector, summed over its elements, so weights are composed as they are loaded and nothing as large as a model waits.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from merger.calibration.backward_passes import BackwardPasses, Objective, separate_blocks
from merger.calibration.block_grams import PartlyMergedModel
from merger.calibration.descent import Descent, start
from merger.calibration.input_observer import InputObserver
from merger.calibration.observed_model import ObservedModel
from merger.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.samples import Batch
    from merger.calibration.settings import Settings
    from merger.options import RunOptions
    from merger.planning.plan import Plan, TensorPlan


BATCH = 1024
"""Tokens of each expert in one step."""


class Composition:
    """The merged model as it is with the coefficients of now, by the output's names.

    A tensor with coefficients is base + sum of c_k delta_k, any other the copy that the plan says.
    """

    def __init__(self, plan: Plan, tensors: Sequence[TensorPlan], descent: Descent) -> None:
        self._plan, self._tensors = plan, {tensor.name: tensor for tensor in tensors}
        self._copies = {tensor.name: tensor for tensor in plan.tensors if not tensor.stages and tensor.parts}
        self._columns = {name: number for number, name in enumerate(self._tensors)}
        starts = torch.tensor([start(tensor) for tensor in tensors])
        starts = starts if descent.per == "tensor" else starts[:1]
        self.values = nn.Parameter(starts.repeat(len(plan.recipe.experts), 1))
        self.learned: set[str] = set()  # the tensors that some gradient came to
        self.clear_gradient()

    def __contains__(self, name: str | None) -> bool:
        """Whether a tensor of the output has coefficients."""
        return name in self._tensors

    def clear_gradient(self) -> None:
        """Begins a step."""
        self.values.grad = torch.zeros_like(self.values)

    def of(self, name: str) -> Tensor:
        """The coefficients of a tensor [k]."""
        return self.values.detach()[:, self._columns[name] % self.values.shape[1]]

    def read(self, name: str) -> Tensor | None:
        """A tensor of the merged model; None for one that the output does not have."""
        if name in self._copies:
            source = self._copies[name].source
            return self._plan.models[source].read(self._copies[name].reads[source] or "")
        if name not in self._tensors:
            return None
        merged, deltas = self._weights(name)
        for coefficient, delta in zip(self.of(name).tolist(), deltas, strict=True):
            merged[: len(delta)] += coefficient * delta
        return merged

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Adds the gradient of a tensor, as some expert has it, to that of its coefficients."""
        self.learned.add(name)
        _, deltas = self._weights(name)
        rows = gradient.detach().float().cpu()
        assert self.values.grad is not None, "a step was begun"
        column = self.values.grad[:, self._columns[name] % self.values.shape[1]]
        column += torch.stack([(delta[: len(rows)] * rows[: len(delta)]).sum() for delta in deltas])

    def _weights(self, name: str) -> tuple[Tensor, Iterator[Tensor]]:
        """A copy of the base's tensor, and the task vectors one after the other, of the rows that both models have."""
        tensor = self._tensors[name]
        base = self._plan.base.read(tensor.reads["base"] or "").float()
        return base.clone(), (self._delta(base, expert, tensor.reads[expert]) for expert in tensor.place.experts)

    def _delta(self, base: Tensor, expert: str, name: str | None) -> Tensor:
        if name is None:
            return torch.zeros_like(base)
        weights = self._plan.models[expert].read(name).float()
        count = min(len(base), len(weights))
        return weights[:count] - base[:count]


def learn_coefficients(
    plan: Plan,
    tensors: Sequence[TensorPlan],
    descent: Descent,
    texts: Mapping[str, tuple[Settings, Sequence[Batch]]],
    options: RunOptions,
    hidden_memory: int | None,
) -> dict[str, dict[str, Tensor]]:
    """Learns the coefficients of these tensors on the experts' ``texts``; returns them by expert and output name.

    Those of tensors that transformers computes with otherwise than they are stored are left out.
    Raises CheckpointError where blocks of a model cannot be run one at a time, or the objective is no number.
    """
    composition = Composition(plan, tensors, descent)
    optimizer = torch.optim.Adam([composition.values], lr=descent.rate)
    memory = None if hidden_memory is None else hidden_memory // len(texts)
    with tempfile.TemporaryDirectory(prefix="merger-") as folder:
        learners = {}
        for name, (settings, batches) in texts.items():
            (Path(folder) / name).mkdir()
            objective = functools.partial(_OBJECTIVES[descent.objective], settings)
            useful = _useful(name, batches, settings, plan.recipe.seed)
            arguments = settings, useful, objective, options, memory, Path(folder) / name
            with separate_blocks(name, "no coefficients can be learned"):
                learners[name] = _Learner(plan, name, composition, *arguments)
        for step in range(descent.steps):
            composition.clear_gradient()
            for name, learner in learners.items():
                with separate_blocks(name, "no coefficients can be learned"):
                    value = learner.add_gradient(step)
                if not isfinite(value):
                    raise CheckpointError(
                        f"{name}: the {descent.objective} is no number at step {step + 1}; lower rate"
                    )
            optimizer.step()
            if descent.clamp:
                composition.values.data.clamp_(0, 1)
            options.progress("learning coefficients", step + 1, descent.steps)
    experts = list(plan.recipe.experts)
    by_name = {tensor.name: composition.of(tensor.name) for tensor in tensors if tensor.name in composition.learned}
    return {
        expert: {name: values[k : k + 1].clone() for name, values in by_name.items()}
        for k, expert in enumerate(experts)
    }


def _useful(expert: str, batches: Sequence[Batch], settings: Settings, seed: int) -> list[Batch]:
    """The batches in which a token counts that comes after another one, in an order of their own."""
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    useful = [batches[i] for i in order if batches[i].counted_tokens(settings.skip_first_tokens)[:, 1:].any()]
    if not useful:
        raise CheckpointError(
            f"{expert}: no token of its text counts that comes after another one; give longer texts, or a smaller "
            "skip_first_tokens"
        )
    return useful


class _Learner:
    """The merged model under the names of one expert, on its text."""

    def __init__(
        self,
        plan: Plan,
        expert: str,
        composition: Composition,
        settings: Settings,
        batches: Sequence[Batch],
        objective: Objective,
        options: RunOptions,
        hidden_memory: int | None,
        folder: Path,
    ) -> None:
        self._composition = composition
        originals = (tensor for tensor in plan.tensors if tensor.tied_to is None)
        self._outputs = {stored: tensor.name for tensor in originals if (stored := tensor.reads.get(expert))}
        merged = PartlyMergedModel(plan, expert, composition.read)
        arguments = batches, settings, options.device, torch.float32, options.trust_remote_code
        observer = functools.partial(InputObserver, gram=False)
        self._model = ObservedModel(plan.models[expert], merged, *arguments, functools.cache(options.notice), observer)
        self._passes = BackwardPasses(self._model, objective, hidden_memory, folder, lambda: None)

    def add_gradient(self, step: int) -> float:
        """Adds the gradient of one batch to that of the coefficients; returns the objective."""
        passes, blocks = self._passes, len(self._model.blocks)
        passes.numbers = [step % len(self._model.batches)]
        if step:
            self._model.reload_outer_modules()
        passes.carry_forward()
        value = passes.begin()
        for block in reversed(range(blocks)):
            passes.through_block(block, self._take)
        passes.outside(self._take)
        return value

    def _take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        loader = self._model.loader
        for name, parameter in parameters.items():
            for stored, _ in loader.stored(name):
                output = self._outputs.get(stored)
                is_plain = output in self._composition and stored in loader.plain_parameters
                if output is not None and is_plain and parameter.grad is not None:
                    self._composition.add_gradient(output, parameter.grad)


def entropy(settings: Settings, number: int, logits: Tensor, batch: Batch) -> Tensor:
    """The mean entropy of the next token's distribution, in nats, over the tokens that count."""
    token_mask = batch.counted_tokens(settings.skip_first_tokens).to(logits.device)
    likelihoods = logits[token_mask].float().log_softmax(-1)
    return -(likelihoods.exp() * likelihoods).sum(-1).mean()


def next_token_loss(settings: Settings, number: int, logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy of the tokens that count, each from those before it."""
    token_mask = batch.counted_tokens(settings.skip_first_tokens)[:, 1:].to(logits.device)
    targets = batch.ids[:, 1:].to(logits.device)[token_mask]
    return torch.nn.functional.cross_entropy(logits[:, :-1][token_mask].float(), targets)


_OBJECTIVES = {"entropy": entropy, "loss": next_token_loss}
