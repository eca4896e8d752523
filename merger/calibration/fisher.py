"""The diagonal Fisher information of a model's parameters, one transformer block at a time.

Fisher merging, https://arxiv.org/abs/2111.09832, section 3: at each position of a sample x a token y_t is drawn from
the model's own distribution of the next one, and F = mean over the samples of (d/dtheta sum_t log p(y_t | x))^2.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from merger.calibration.backward_passes import BackwardPasses
from merger.calibration.block_runner import Progress, batch_counter
from merger.calibration.input_observer import InputObserver
from merger.calibration.observed_model import ObservedModel
from merger.errors import CheckpointError
from merger.ops.arithmetic import uniforms

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.samples import Batch
    from merger.calibration.settings import Settings
    from merger.checkpoint.checkpoint import Checkpoint
    from merger.options import RunOptions

Fisher = dict[str, "Tensor"]
"""The Fisher information of stored tensors by their names, float32."""


def fisher_blocks(
    weights: Checkpoint,
    samples: Sequence[Batch],
    settings: Settings,
    options: RunOptions,
    hidden_memory: int | None,
    progress: Progress,
) -> Iterator[Fisher]:
    """Yields the Fisher information of one block after the other, the last one first; then of all outside the blocks.

    ``samples`` are batches of one sample each. Tensors that transformers computes with otherwise than they are stored,
    such as packed experts, are left out. Raises UnsupportedBlocks where blocks cannot be run one at a time, and
    CheckpointError where the model predicts no tokens or a gradient is not finite.
    """
    arguments = samples, settings, options.device, torch.float32, options.trust_remote_code
    observer = functools.partial(InputObserver, gram=False)
    model = ObservedModel(weights, weights, *arguments, functools.cache(options.notice), observer)
    likelihood = functools.partial(_likelihood, settings)
    count_batch = batch_counter(2 * (len(model.blocks) + 1) * len(model.batches), progress)
    with tempfile.TemporaryDirectory(prefix="merger-") as folder:
        passes = BackwardPasses(model, likelihood, hidden_memory, Path(folder), count_batch)
        passes.carry_forward()
        passes.begin()
        for block in reversed(range(len(model.blocks))):
            squares = _Squares()
            passes.through_block(block, squares.add)
            yield squares.means_by_stored_name(model)
        squares = _Squares()
        passes.outside(squares.add)
        yield squares.means_by_stored_name(model)


def _likelihood(settings: Settings, number: int, logits: Tensor, batch: Batch) -> Tensor:
    """The log-likelihood of tokens that are drawn from the distribution of ``logits`` [1 t v] at each position."""
    token_mask = batch.counted_tokens(settings.skip_first_tokens).to(logits.device)
    likelihoods = logits[token_mask].float().log_softmax(-1)
    sums = likelihoods.detach().double().exp().cumsum(-1)
    draws = uniforms((settings.seed, "fisher", number), 0, len(sums), 1, double=True).to(sums.device)
    tokens = (sums < draws * sums[:, -1:]).sum(-1, keepdim=True)
    return likelihoods.gather(-1, tokens).sum()


class _Squares:
    """The sums over samples of the squared gradients of parameters, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Adds the gradients of one sample."""
        for name, parameter in parameters.items():
            total = self._sums.setdefault(name, torch.zeros_like(parameter, requires_grad=False))
            if parameter.grad is not None:
                total += parameter.grad.square_()

    def means_by_stored_name(self, model: ObservedModel) -> Fisher:
        """The means by the names of stored tensors; CheckpointError if one is not finite."""
        loader, fisher = model.loader, Fisher()
        for parameter, square in self._sums.items():
            for name, _ in loader.stored(parameter):
                if name in loader.plain_parameters:
                    fisher[name] = (square / len(model.batches)).cpu()
                    if not torch.isfinite(fisher[name]).all():
                        raise CheckpointError(f"{model.label}: the gradient of {name} is not finite")
        return fisher
