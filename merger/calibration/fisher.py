"""The diagonal Fisher information of a model's parameters, one transformer block at a time.

Fisher merging, https://arxiv.org/abs/2111.09832, section 3: at each position of a sample x a token y_t is drawn from
the model's own distribution of the next one, and F = mean over the samples of (d/dtheta sum_t log p(y_t | x))^2. Hidden
states go forward through the blocks and are kept; gradients come back from the last block to the first, and each block
is run once more for them. So one block's weights, gradients and squares are in memory at a time.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from merger.calibration.block_runner import (
    EMBEDDING,
    BlockRunner,
    HiddenStates,
    Progress,
    batch_counter,
    check_blocks_are_separate,
    run_batch,
    run_block,
    split_arguments,
    with_hidden_states,
)
from merger.calibration.input_observer import InputObserver
from merger.calibration.observed_model import ObservedModel
from merger.errors import CheckpointError, checkpoint_faults
from merger.ops.arithmetic import uniforms
from merger.ops.precision import full_float32

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
    check_blocks_are_separate(model)
    with tempfile.TemporaryDirectory(prefix="merger-") as folder:
        backward = _Backward(model, settings, hidden_memory, Path(folder), progress)
        backward.carry_forward()
        backward.begin()
        for block in reversed(range(len(model.blocks))):
            yield backward.through_block(block)
        yield backward.outside()


class _Backward:
    """The passes over one model: forward, from the last hidden states back to the first, and outside the blocks."""

    def __init__(
        self, model: ObservedModel, settings: Settings, hidden_memory: int | None, folder: Path, progress: Progress
    ) -> None:
        self._model, self._seed = model, settings.seed
        count = len(model.blocks)
        memory = None if hidden_memory is None else hidden_memory // (count + 2)
        self._states = [_hidden_states(memory, folder / f"{place}") for place in range(count + 1)]  # before each block
        self._gradients = _hidden_states(memory, folder / "gradients")
        self._runner = BlockRunner(model.blocks, model.observer, self._states[0])
        self._count_batch = batch_counter(2 * (count + 1) * len(model.batches), progress)

    def carry_forward(self) -> None:
        """Keeps the hidden states before each block, and those behind the last one."""
        model, runner = self._model, self._runner
        for number, batch in enumerate(model.batches):
            run_batch(model, runner, EMBEDDING, number, batch, "both")
        for block, name in enumerate(model.block_names):
            model.randomise_embedding(seed=block)
            before, runner.hidden_states = self._states[block], self._states[block + 1]
            for number in range(len(model.batches)):
                runner.hidden_states.put(number, before.get(number, model.loader.device))
            run_block(model, runner, block, model.weights, "carry", self._count_batch)
            model.loader.drop(name)
        model.take("")  # raises where an activation is not finite

    def begin(self) -> None:
        """Finds the gradients of the last hidden states."""
        self._model.restore_embedding()
        self._model.restore_head()
        for number, batch in enumerate(self._model.batches):
            hidden = self._last_hidden(number).requires_grad_()
            _, likelihood = self._outside(number, batch, hidden)
            self._gradients.put(number, *torch.autograd.grad(likelihood, hidden))
            self._count_batch()

    def through_block(self, block: int) -> Fisher:
        """Returns the Fisher information of a block, and takes the gradients back before it."""
        model, runner = self._model, self._runner
        name = model.block_names[block]
        model.loader.load(name, model.weights)
        runner.hidden_states = self._states[block]
        squares = _Squares(model.model.get_submodule(name).named_parameters(prefix=name))
        for number, batch in enumerate(model.batches):
            runner.compute = functools.partial(self._compute, number)
            run_batch(model, runner, block, number, batch, "learn")
            squares.add()
            self._count_batch()
        model.loader.drop(name)
        return self._by_stored_name(squares)

    def _compute(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = split_arguments(args, kwargs)[0].detach().requires_grad_()  # what waits keeps no gradient
        args, kwargs = with_hidden_states(args, kwargs, hidden)
        with torch.enable_grad():
            output = forward(*args, **kwargs)
            first = output if isinstance(output, torch.Tensor) else output[0]
            first.backward(self._gradients.get(number, first.device))
        assert hidden.grad is not None
        self._gradients.put(number, hidden.grad)
        return output

    def outside(self) -> Fisher:
        """Returns the Fisher information of what is before the blocks and behind them, which a tied table is both."""
        squares = _Squares(self._model.model.named_parameters())
        for number, batch in enumerate(self._model.batches):
            embedded, likelihood = self._outside(number, batch, self._last_hidden(number))
            gradient = self._gradients.get(number, embedded.device)
            torch.autograd.backward([likelihood, embedded], [torch.ones_like(likelihood), gradient])
            squares.add()
            self._count_batch()
        return self._by_stored_name(squares)

    def _last_hidden(self, number: int) -> Tensor:
        """What leaves the last block, apart from the place where it waits."""
        return self._states[-1].get(number, self._model.loader.device).detach()

    def _outside(self, number: int, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the first block, and the log-likelihood of drawn tokens where ``hidden`` leaves the last one."""
        model, entered = self._model, list[torch.Tensor]()

        def keep_first(_: Any, args: Any, kwargs: Any) -> None:
            entered.append(split_arguments(args, kwargs)[0])

        def replace_last(_: Any, __: Any, output: Any) -> Any:
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        first, last = model.blocks[0], model.blocks[-1]
        hooks = (
            first.register_forward_pre_hook(keep_first, with_kwargs=True),
            last.register_forward_hook(replace_last),
        )
        self._runner.begin(len(model.blocks), number, "carry")
        try:
            likelihood = self._likelihood(number, self._logits(batch), model.counted_tokens(batch))
            return entered[0], likelihood
        finally:
            for hook in hooks:
                hook.remove()

    def _logits(self, batch: Batch) -> Tensor:
        """What the model predicts; CheckpointError where it predicts no tokens."""
        model = self._model
        with torch.enable_grad(), full_float32(), checkpoint_faults(f"{model.label}: its head cannot be run"):
            ids, mask = batch.ids.to(model.loader.device), batch.mask.long().to(model.loader.device)
            output = model.model(input_ids=ids, attention_mask=mask)
        if getattr(output, "logits", None) is None:
            raise CheckpointError(f"{model.label}: predicts no tokens, and the Fisher information is that of tokens")
        logits: Tensor = output.logits
        return logits

    def _likelihood(self, number: int, logits: Tensor, token_mask: Tensor) -> Tensor:
        """The log-likelihood of tokens that are drawn from the distribution of ``logits`` [1 t v] at each position."""
        with torch.enable_grad():
            likelihoods = logits[token_mask].float().log_softmax(-1)
            sums = likelihoods.detach().double().exp().cumsum(-1)
            draws = uniforms((self._seed, "fisher", number), 0, len(sums), 1, double=True).to(sums.device)
            tokens = (sums < draws * sums[:, -1:]).sum(-1, keepdim=True)
            return likelihoods.gather(-1, tokens).sum()

    def _by_stored_name(self, squares: _Squares) -> Fisher:
        """The means by the names of stored tensors; CheckpointError if one is not finite."""
        loader, fisher = self._model.loader, Fisher()
        for parameter, square in squares.sums.items():
            for name, _ in loader.stored(parameter):
                if name in loader.plain_parameters:
                    fisher[name] = (square / len(self._model.batches)).cpu()
                    if not torch.isfinite(fisher[name]).all():
                        raise CheckpointError(f"{self._model.label}: the gradient of {name} is not finite")
        return fisher


class _Squares:
    """The sums over samples of the squared gradients of parameters, by name; those without weights are left out."""

    def __init__(self, parameters: Iterator[tuple[str, nn.Parameter]]) -> None:
        self._parameters = {name: parameter.requires_grad_() for name, parameter in parameters if not parameter.is_meta}
        self.sums = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}

    def add(self) -> None:
        """Adds the gradients of one sample, and drops them."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.sums[name] += parameter.grad.square_()
                parameter.grad = None


def _hidden_states(memory: int | None, folder: Path) -> HiddenStates:
    folder.mkdir()
    return HiddenStates(memory, folder)
