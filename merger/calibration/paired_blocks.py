"""Two models on the same text, block by block: a merge in progress, and the expert that it is to answer like.

FeatCal, https://arxiv.org/abs/2605.13030, section 4: the block that is to be merged is observed as a draft, behind the
merged blocks, beside the expert's own block behind the expert's own blocks.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import call
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merger.calibration.block_runner import (
    EMBEDDING,
    BlockRunner,
    HiddenStates,
    Progress,
    Results,
    batch_counter,
    check_blocks_are_separate,
    run_batch,
    run_block,
)
from merger.calibration.input_observer import InputObserver, RowObserver
from merger.calibration.observed_model import ObservedModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merger.calibration.moments import Moments
    from merger.calibration.samples import Batch
    from merger.calibration.settings import Settings
    from merger.calibration.weights import TensorSource
    from merger.checkpoint.checkpoint import Checkpoint
    from merger.options import RunOptions


@contextmanager
def open_pair(
    expert: Checkpoint,
    draft: TensorSource,
    merged: TensorSource,
    batches: Sequence[Batch],
    settings: Settings,
    options: RunOptions,
    *,
    hidden_memory: int | None = None,
    gram: bool = True,
    dtype: torch.dtype | None = None,
) -> Iterator[Pair]:
    """Opens a merge in progress beside an expert, with the hidden states of both.

    ``draft`` has the blocks as they are observed, ``merged`` as hidden states pass through them once the caller asks
    for the next block. With ``gram`` inputs are multiplied with each other, and with the expert's. ``dtype`` is that
    of the computation, by default the device's own for the checkpoint. Raises UnsupportedBlocks where blocks cannot be
    run one at a time, and CheckpointError where an activation is not finite.
    """
    notice = functools.cache(options.notice)

    def model(outer_weights: TensorSource, observer: Callable[..., InputObserver]) -> ObservedModel:
        arguments = batches, settings, options.device, dtype, options.trust_remote_code, notice
        return ObservedModel(expert, outer_weights, *arguments, observer)

    teacher = model(expert, RowObserver)
    assert isinstance(teacher.observer, RowObserver)
    rows = teacher.observer if gram else None
    student = model(merged, functools.partial(InputObserver, gram=gram, teacher=rows))
    with tempfile.TemporaryDirectory(prefix="merger-") as folder:
        yield Pair(teacher, student, draft, merged, hidden_memory, Path(folder))


@dataclass(frozen=True)
class _Replaced:
    """A source of tensors with others in place of some."""

    source: TensorSource
    tensors: Mapping[str, Tensor]

    def read(self, name: str) -> Tensor:
        """Reads a whole tensor."""
        return self.tensors[name] if name in self.tensors else self.source.read(name)


class Pair:
    """A merge in progress beside one of its experts, on the expert's text."""

    def __init__(
        self,
        teacher: ObservedModel,
        student: ObservedModel,
        draft: TensorSource,
        merged: TensorSource,
        hidden_memory: int | None,
        folder: Path,
    ) -> None:
        self.teacher, self.student = teacher, student
        self._draft, self._merged = draft, merged
        memory = None if hidden_memory is None else hidden_memory // 2
        self._runners = {}
        for role, model in (("teacher", teacher), ("student", student)):
            check_blocks_are_separate(model)
            states = folder / role
            states.mkdir()
            runner = self._runners[role] = BlockRunner(model.blocks, model.observer, HiddenStates(memory, states))
            for number, batch in enumerate(model.batches):
                run_batch(model, runner, EMBEDDING, number, batch, "both")

    def blocks(self, progress: Progress) -> Results:
        """Observes block after block, and carries hidden states through the merged one when the next is asked for."""
        student = self.student
        count_batch = batch_counter(2 * len(student.block_names) * len(student.batches), progress)
        for self.block, name in enumerate(student.block_names):
            yield student.unit_name(name), self._observe(name, count_batch)
            run_block(student, self._runners["student"], self.block, self._merged, "carry", count_batch)
            student.loader.drop(name)
        yield "", student.outer_moments()

    def _observe(self, name: str, count_batch: Callable[[], None]) -> dict[str, Moments]:
        for model, source in ((self.teacher, self.teacher.weights), (self.student, self._draft)):
            model.randomise_embedding(seed=self.block)
            model.loader.load(name, source)
        for number, batch in enumerate(self.student.batches):
            run_batch(self.teacher, self._runners["teacher"], self.block, number, batch, "both")
            run_batch(self.student, self._runners["student"], self.block, number, batch, "observe")
            count_batch()
        self.teacher.observer.begin(self.student.batches[0], self.teacher.loader.device)  # its last rows are no others'
        moments = self.student.take(name)
        for model in (self.teacher, self.student):
            model.loader.drop(name)
        return moments

    # --- learning, after the block was observed ---

    def share(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Loads the draft of the block, with these parameters in place of the tensors of these names."""
        loader = self.student.loader
        loader.load(self.student.block_names[self.block], _Replaced(self._draft, parameters))
        for name, parameter in parameters.items():
            loader.place(loader.plain_parameters[name], parameter)

    def add_gradient(self, number: int, weight: float) -> float:
        """Adds the gradient of a batch's loss, times ``weight``, to the block's parameters; returns the loss.

        That is the squared distance of the block's output from the expert's, as a share of the expert's square.
        """
        losses: list[Tensor] = []
        runner, batch = self._runners["student"], self.student.batches[number]
        token_mask = self.student.counted_tokens(batch)
        target = self._runners["teacher"].hidden_states.get(number, token_mask.device)[token_mask]

        def learn(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with torch.enable_grad():
                output = forward(*args, **kwargs)
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                loss = (hidden[token_mask] - target).square().sum() / target.square().sum()
                (loss * weight).backward()
            losses.append(loss.detach())
            return output

        runner.compute = learn
        run_batch(self.student, runner, self.block, number, batch, "learn")
        runner.compute = call
        return float(losses[0])

    def drop(self) -> None:
        """Drops the weights of the block."""
        self.student.loader.drop(self.student.block_names[self.block])
