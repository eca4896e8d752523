"""The forward pass, one transformer block at a time.

For each block the model's own forward pass runs on every batch, from the embedding on, but of the blocks only
that one is real: those before it hand on what they are given, and the real one gets the hidden states that
were carried over from its predecessor. Where the next block would begin, its input is kept and the pass ends.
A first round of passes, in which no block is real, keeps what the embedding gives to the first one. So masks,
positions and whatever else a model prepares for its blocks are made by the model itself, and nothing here knows
an architecture.

Blocks may tell each other nothing but hidden states. To check it, on the first batch the stand-ins for the embedding
and the earlier blocks give other values in every pass; if anything but the hidden states that reach a block changed,
the model runs whole.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from operator import call
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils._pytree import tree_leaves

from merger.calibration.observed_model import EndOfPass, ObservedModel
from merger.checkpoint.disk import allocate, disk_error
from merger.errors import MergerError, checkpoint_faults, lacks_memory
from merger.ops.transfer import buffer, buffer_bytes, to_device

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merger.calibration.input_observer import InputObserver
    from merger.calibration.moments import Moments
    from merger.calibration.samples import Batch
    from merger.calibration.weights import TensorSource

Progress = Callable[[int, int], None]
Results = Iterator[tuple[str, dict[str, "Moments"]]]


Purpose = Literal["observe", "carry", "both", "learn"]
"""The purpose of a pass: to observe the inputs of the matrices, to carry hidden states to the next block, or both; or
to compute the block alone."""

EMBEDDING = -1  # the block number of the embedding, which comes before block 0


class UnsupportedBlocks(Exception):
    """The blocks of this model cannot be run one at a time; the message says why."""


def run_blocks(
    model: ObservedModel,
    hidden_memory: int | None,
    progress: Progress,
    merged_weights: TensorSource | None = None,
    finished_units: Container[str] = (),
) -> Results:
    """Runs all batches through one block after the other; modules outside the blocks come last, with an empty name.

    With ``merged_weights`` batches run through a block twice: observed, with the model's own weights, and then with the
    merged weights, after the caller has received the block's moments. Blocks in ``finished_units`` only carry hidden
    states.
    """
    check_blocks_are_separate(model)
    names = model.block_names
    with tempfile.TemporaryDirectory(prefix="merger-") as folder:
        runner = BlockRunner(model.blocks, model.observer, HiddenStates(hidden_memory, Path(folder)))
        for number, batch in enumerate(model.batches):
            run_batch(model, runner, EMBEDDING, number, batch, "both")
        units = [model.unit_name(name) for name in names]
        passes = sum(1 if merged_weights is None or unit in finished_units else 2 for unit in units)
        count_batch = batch_counter(passes * len(model.batches), progress)
        for block, (name, unit) in enumerate(zip(names, units, strict=True)):
            model.randomise_embedding(seed=block)
            if unit not in finished_units:
                purpose: Purpose = "both" if merged_weights is None else "observe"
                run_block(model, runner, block, model.weights, purpose, count_batch)
                moments = model.take(name)
                model.loader.drop(name)
                yield unit, moments
            if merged_weights is not None or unit in finished_units:
                run_block(model, runner, block, merged_weights or model.weights, "carry", count_batch)
                model.loader.drop(name)
        yield "", model.outer_moments()


def check_blocks_are_separate(model: ObservedModel) -> None:
    """Raises UnsupportedBlocks if a model has no blocks, or if they share weights."""
    if not model.block_names:
        raise UnsupportedBlocks("it has no list of blocks")
    weights = [weight for block in model.blocks for weight in block.parameters()]
    if len(weights) > len(set(weights)):
        raise UnsupportedBlocks("its blocks share weights")


def batch_counter(total: int, progress: Progress) -> Callable[[], None]:
    """A function that reports one more batch, out of a ``total`` over all passes, each time that it is called."""
    counts = itertools.count(1)
    return lambda: progress(next(counts), total)


def run_block(
    model: ObservedModel,
    runner: BlockRunner,
    block: int,
    source: TensorSource,
    purpose: Purpose,
    count_batch: Callable[[], None],
) -> None:
    """Runs all batches through one block with the block's weights from ``source``; counts each."""
    model.loader.load(model.block_names[block], source)
    for number, batch in enumerate(model.batches):
        run_batch(model, runner, block, number, batch, purpose)
        count_batch()


def run_batch(
    model: ObservedModel, runner: BlockRunner, block: int, number: int, batch: Batch, purpose: Purpose
) -> None:
    """Runs one batch through one block; restores the true embedding if the first block depends on it too."""
    try:
        runner.begin(block, number, purpose)
        _forward(model, batch)
    except UnsupportedBlocks:
        if block != 0 or number != 0 or not model.restore_embedding():
            raise
        runner.begin(block, number, purpose)
        _forward(model, batch)
    runner.end()


def _forward(model: ObservedModel, batch: Batch) -> None:
    try:
        model.forward(batch)
    except (MergerError, UnsupportedBlocks):
        raise
    except Exception as error:  # model code that meets stand-ins can fail in any way
        if lacks_memory(error):
            raise
        raise UnsupportedBlocks(f"{type(error).__name__}: {error}") from error


def run_whole_model(model: ObservedModel, progress: Progress) -> Results:
    """Runs the whole model on every batch; its blocks are loaded when they are called and dropped afterwards."""
    for name, block in zip(model.block_names, model.blocks, strict=True):
        block.register_forward_pre_hook(lambda *_, name=name: model.loader.load(name, model.weights))
        block.register_forward_hook(lambda *_, name=name: model.loader.drop(name))
    model.observer.on = True
    for number, batch in enumerate(model.batches):
        with checkpoint_faults(f"{model.label}: the model cannot be run on text, so take a method without calibration"):
            model.forward(batch)
        progress(number + 1, len(model.batches))
    yield "", model.outer_moments()


class BlockRunner:
    """Stands in for all blocks of a model but one, in the forward pass that the model itself makes."""

    def __init__(self, blocks: Sequence[nn.Module], observer: InputObserver, hidden_states: HiddenStates) -> None:
        self._observer, self.hidden_states = observer, hidden_states
        self._last = len(blocks) - 1
        self.compute: Callable[..., Any] = call  # calls the forward pass of the real block with its arguments
        self._tuple_lengths: dict[int, int] = {}  # how long a tuple each block returns; 0 for a bare tensor
        self._expected_arguments: list[Any] = []  # of the next block and the first batch, without hidden states
        for index, block in enumerate(blocks):
            block.forward = functools.partial(self._call, index, block.forward)

    def begin(self, block: int, batch: int, purpose: Purpose) -> None:
        """Sets the real block of the next pass, the batch, and the purpose of the pass."""
        self._block, self._batch, self._purpose, self._next = block, batch, purpose, 0
        self._observer.on = block == EMBEDDING

    def end(self) -> None:
        """Raises UnsupportedBlocks if the pass did not reach the real block."""
        if self._next <= self._block:
            raise UnsupportedBlocks(f"its block {self._next} is never called")

    def _call(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index != self._next:
            raise UnsupportedBlocks("its blocks do not follow one another")
        self._next += 1
        hidden, arguments = split_arguments(args, kwargs)
        if index < self._block:
            return self._stand_in(index, hidden)
        if index > self._block:
            if self._batch == 0:
                self._expected_arguments = arguments
            self.hidden_states.put(self._batch, hidden)
            raise EndOfPass
        is_first_run = self._purpose != "learn"
        if is_first_run and self._batch == 0 and not _equal_arguments(arguments, self._expected_arguments):
            raise UnsupportedBlocks("its blocks depend on one another by more than hidden states")
        args, kwargs = with_hidden_states(args, kwargs, self.hidden_states.get(self._batch, hidden.device))
        self._observer.on = self._purpose in ("observe", "both")
        output = self.compute(forward, *args, **kwargs)
        self._tuple_lengths[index] = _tuple_length(output)
        if self._purpose in ("observe", "learn"):
            raise EndOfPass
        if index == self._last:  # no next block keeps what it is given
            self.hidden_states.put(self._batch, output[0] if self._tuple_lengths[index] else output)
        self._observer.on = True  # what comes after the last block is not in any
        return output

    def _stand_in(self, index: int, hidden: Tensor) -> Any:
        """The output of a block that is not real in this pass: its input, in the form in which the block returns it."""
        length = self._tuple_lengths[index]
        if self._batch == 0:
            hidden = hidden + self._block  # another value in every pass
        return (hidden, *[None] * (length - 1)) if length else hidden


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    """Splits a block's arguments into the hidden states and the leaves of all other arguments."""
    if args:
        return args[0], tree_leaves((args[1:], kwargs))
    if "hidden_states" not in kwargs:
        raise UnsupportedBlocks(f"its blocks take {', '.join(kwargs) or 'nothing'}, and no hidden states")
    return kwargs["hidden_states"], tree_leaves({name: kwargs[name] for name in kwargs if name != "hidden_states"})


def with_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def _tuple_length(block_output: Any) -> int:
    if isinstance(block_output, torch.Tensor):
        return 0
    if type(block_output) is not tuple or not isinstance(block_output[0], torch.Tensor):
        raise UnsupportedBlocks(f"its blocks return a {type(block_output).__name__}")
    return len(block_output)


def _equal_arguments(arguments: Sequence[Any], earlier_arguments: Sequence[Any]) -> bool:
    """Whether two calls of a block had equal arguments; of objects such as an empty cache only the type is compared."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return torch.equal(a, b)
        return type(a) is type(b) and (a == b or not isinstance(a, (bool, int, float, str)))

    return len(arguments) == len(earlier_arguments) and all(map(equal, arguments, earlier_arguments))


class HiddenStates:
    """The hidden states between two blocks, batch by batch: in host memory, and above ``hidden_memory`` bytes in files.

    Copies to and from a GPU are in the order of its stream, and nobody looks at them here, so nobody waits for them.
    """

    def __init__(self, hidden_memory: int | None, folder: Path) -> None:
        self._hidden_memory = self._free_bytes = hidden_memory
        self._folder = folder
        self._buffers: dict[int, Tensor] = {}

    def get(self, batch: int, device: torch.device) -> Tensor:
        """Returns the hidden states of a batch on the device of the next block."""
        return to_device(self._buffers[batch], device)

    def clear(self) -> None:
        """Drops the hidden states of all batches."""
        self._buffers.clear()
        self._free_bytes = self._hidden_memory

    def put(self, batch: int, hidden: Tensor) -> None:
        """Copies the hidden states of a batch to their place.

        To keep the tensors themselves would cost no copy, but 100 MB of holes in the heap with the 135M model.
        """
        if batch not in self._buffers:
            self._buffers[batch] = self._allocate_buffer(batch, hidden)
        place = self._buffers[batch]
        place.copy_(hidden, non_blocking=place.is_pinned())

    def _allocate_buffer(self, batch: int, hidden: Tensor) -> Tensor:
        size = buffer_bytes(hidden.nbytes, hidden.device)
        if self._free_bytes is None or size <= self._free_bytes:
            self._free_bytes = None if self._free_bytes is None else self._free_bytes - size
            return buffer(hidden.shape, hidden.dtype, hidden.device)
        path = self._folder / f"{batch}.bin"
        _create_file(path, hidden.nbytes)  # a mapped file that the disk has no room for ends the process (SIGBUS)
        return torch.from_file(str(path), shared=True, size=hidden.numel(), dtype=hidden.dtype).view(hidden.shape)


def _create_file(path: Path, size: int) -> None:
    """Creates a file of ``size`` bytes; raises ResourceError if the disk is full."""
    try:
        with path.open("wb") as file:
            allocate(file.fileno(), size)
    except OSError as error:
        raise disk_error(path, error, size) from None
