"""Forward and backward passes over a whole model, of which one transformer block is in memory at a time.

Hidden states go forward through the blocks and are kept; gradients come back from the last block to the first, and each
block is run once more for them. So one block's weights and gradients are in memory at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import call
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merger.calibration.block_runner import (
    EMBEDDING,
    BlockRunner,
    HiddenStates,
    UnsupportedBlocks,
    check_blocks_are_separate,
    run_batch,
    split_arguments,
    with_hidden_states,
)
from merger.errors import CheckpointError, checkpoint_faults
from merger.ops.precision import full_float32

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merger.calibration.observed_model import ObservedModel
    from merger.calibration.samples import Batch

Objective = Callable[[int, "Tensor", "Batch"], "Tensor"]
"""A number of the batch of this index, from its logits [b t v] and the batch."""
GradientSink = Callable[[Mapping[str, "nn.Parameter"]], None]
"""Takes the parameters of a block by their names, with the gradients of one batch, which are dropped after it.

A parameter that the batch did not reach has none."""


class BackwardPasses:
    """The passes over one model: forward, from the last hidden states back to the first, and outside the blocks.

    All run on the batches of the indices in ``numbers``, by default all. Hidden states are kept until the next forward
    pass. Weights are the model's ``merged_weights``.
    Raises UnsupportedBlocks where blocks cannot be run one at a time, and CheckpointError where the model predicts no
    tokens.
    """

    def __init__(
        self,
        model: ObservedModel,
        objective: Objective,
        hidden_memory: int | None,
        folder: Path,
        count_batch: Callable[[], None],
    ) -> None:
        check_blocks_are_separate(model)
        self.model, self._objective, self._count_batch = model, objective, count_batch
        self.numbers: Sequence[int] = range(len(model.batches))
        count = len(model.blocks)
        memory = None if hidden_memory is None else hidden_memory // (count + 2)
        self._states = [_hidden_states(memory, folder / f"{place}") for place in range(count + 1)]  # before each block
        self._gradients = _hidden_states(memory, folder / "gradients")
        self._runner = BlockRunner(model.blocks, model.observer, self._states[0])

    def carry_forward(self) -> None:
        """Keeps the hidden states before each block, and those behind the last one."""
        model, runner = self.model, self._runner
        for states in (*self._states, self._gradients):
            states.clear()
        runner.hidden_states = self._states[0]
        for number in self.numbers:
            run_batch(model, runner, EMBEDDING, number, model.batches[number], "both")
        for block, name in enumerate(model.block_names):
            model.randomise_embedding(seed=block)
            before, runner.hidden_states = self._states[block], self._states[block + 1]
            model.loader.load(name, model.merged_weights)
            for number in self.numbers:
                runner.hidden_states.put(number, before.get(number, model.loader.device))
                run_batch(model, runner, block, number, model.batches[number], "carry")
                self._count_batch()
            model.loader.drop(name)
        model.take("")  # raises where an activation is not finite

    def begin(self) -> float:
        """Finds the gradients of the last hidden states; returns the mean objective of the batches."""
        self.model.restore_embedding()
        self.model.restore_head()
        total = 0.0
        for number in self.numbers:
            hidden = self._last_hidden(number).requires_grad_()
            _, value = self._outside(number, hidden)
            self._gradients.put(number, *torch.autograd.grad(value, hidden))
            total += float(value.detach())
            self._count_batch()
        return total / len(self.numbers)

    def through_block(self, block: int, sink: GradientSink) -> None:
        """Takes the gradients back before a block, and hands those of its parameters on."""
        model, runner = self.model, self._runner
        name = model.block_names[block]
        model.loader.load(name, model.merged_weights)
        runner.hidden_states = self._states[block]
        parameters = _with_gradients(model.model.get_submodule(name).named_parameters(prefix=name))
        for number in self.numbers:
            runner.compute = functools.partial(self._compute, number)
            run_batch(model, runner, block, number, model.batches[number], "learn")
            _hand_on(parameters, sink)
            self._count_batch()
        runner.compute = call
        model.loader.drop(name)

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

    def outside(self, sink: GradientSink) -> None:
        """Hands on the gradients of what is before the blocks and behind them, which a tied table is both."""
        parameters = _with_gradients(self.model.model.named_parameters())
        for number in self.numbers:
            embedded, value = self._outside(number, self._last_hidden(number))
            gradient = self._gradients.get(number, embedded.device)
            torch.autograd.backward([value, embedded], [torch.ones_like(value), gradient])
            _hand_on(parameters, sink)
            self._count_batch()

    def _last_hidden(self, number: int) -> Tensor:
        """What leaves the last block, apart from the place where it waits."""
        return self._states[-1].get(number, self.model.loader.device).detach()

    def _outside(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the first block, and the objective where ``hidden`` leaves the last one."""
        model, batch, entered = self.model, self.model.batches[number], list[torch.Tensor]()

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
            logits = self._logits(batch)
            with torch.enable_grad():
                return entered[0], self._objective(number, logits, batch)
        finally:
            for hook in hooks:
                hook.remove()

    def _logits(self, batch: Batch) -> Tensor:
        """What the model predicts; CheckpointError where it predicts no tokens."""
        model = self.model
        with torch.enable_grad(), full_float32(), checkpoint_faults(f"{model.label}: its head cannot be run"):
            ids, mask = batch.ids.to(model.loader.device), batch.mask.long().to(model.loader.device)
            output = model.model(input_ids=ids, attention_mask=mask)
        if getattr(output, "logits", None) is None:
            raise CheckpointError(f"{model.label}: predicts no tokens, so there are no gradients of them")
        logits: Tensor = output.logits
        return logits


@contextmanager
def separate_blocks(label: str, consequence: str) -> Iterator[None]:
    """Turns UnsupportedBlocks of a model into a CheckpointError, with what cannot be had then."""
    try:
        yield
    except UnsupportedBlocks as error:
        raise CheckpointError(
            f"{label}: its blocks cannot be run one at a time ({error}), so {consequence}; "
            "use a method that needs no gradients, such as regmean"
        ) from None


def _with_gradients(parameters: Any) -> dict[str, nn.Parameter]:
    """The parameters that are in memory, by name; from now on they get gradients."""
    return {name: parameter.requires_grad_() for name, parameter in parameters if not parameter.is_meta}


def _hand_on(parameters: Mapping[str, nn.Parameter], sink: GradientSink) -> None:
    sink(parameters)
    for parameter in parameters.values():
        parameter.grad = None


def _hidden_states(memory: int | None, folder: Path) -> HiddenStates:
    folder.mkdir()
    return HiddenStates(memory, folder)
