"""The forward pass, one transformer block at a time.

For each block the model's own forward pass runs on every batch, from the embedding on, but of the blocks only
that one is real: those before it hand on what they are given, and the real one gets the hidden states that
were carried over from its predecessor. Where the next block would begin, its input is kept and the pass ends.
A first round of passes, in which no block is real, keeps what the embedding gives to the first one. So masks,
positions and whatever else a model prepares for its blocks are made by the model itself, and nothing here knows
an architecture.

This is right if blocks tell each other nothing but hidden states. What stands in for the embedding and for earlier
blocks gives other values in every pass, so a block that is told anything else that depends on them is told something
else in every pass; that is checked on the first batch. A model that fails it runs whole.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils._pytree import tree_leaves

from merger.calibration.model_host import Rig, Stop
from merger.errors import MergerError, checkpoint_faults, lacks_memory
from merger.ops.transfer import buffer, buffer_bytes, sent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merger.calibration.input_observer import Watch
    from merger.calibration.moments import Moments
    from merger.calibration.samples import Batch
    from merger.calibration.weights import Readable

Progress = Callable[[int, int], None]
Results = Iterator[tuple[str, dict[str, "Moments"]]]


Doing = Literal["watch", "carry", "both"]
"""What a pass is for: to see what enters the matrices, to bring hidden states to the next block, or both at once."""

EMBEDDING = -1  # what stands before block 0


class Unfit(Exception):
    """The blocks of this model cannot be run one at a time; the message says why."""


def by_block(
    rig: Rig,
    host_memory: int | None,
    progress: Progress,
    onward: Readable | None = None,
    known: Container[str] = (),
) -> Results:
    """All batches through one block after the other; what is outside the blocks comes last, under no name.

    With ``onward`` they go through a block twice: watched, with the model's own weights, and then on to the next
    block with those that ``onward`` has for it once the caller has seen what was found. Blocks that are
    ``known`` are only gone through.
    """
    names = rig.block_names
    if not names:
        raise Unfit("it has no list of blocks")
    weights = [weight for block in rig.blocks for weight in block.parameters()]
    if len(weights) > len(set(weights)):
        raise Unfit("its blocks share weights")
    with tempfile.TemporaryDirectory(prefix="merger-") as folder:
        relay = Relay(rig.blocks, rig.watch, Carried(host_memory, Path(folder)))
        for number, batch in enumerate(rig.batches):
            _pass(rig, relay, EMBEDDING, number, batch, "both")
        for block, name in enumerate(names):
            rig.forget_embedding(seed=block)
            unit = rig.unit(name)
            if unit not in known:
                _through(rig, relay, block, rig.weights, "both" if onward is None else "watch", progress)
                moments = rig.take(name)
                rig.loader.drop(name)
                yield unit, moments
            if onward is not None or unit in known:
                _through(rig, relay, block, onward or rig.weights, "carry", progress)
                rig.loader.drop(name)
        yield "", rig.rest()


def _through(rig: Rig, relay: Relay, block: int, source: Readable, doing: Doing, progress: Progress) -> None:
    """All batches through one block with the weights that ``source`` has for it."""
    rig.loader.load(rig.block_names[block], source)
    for number, batch in enumerate(rig.batches):
        _pass(rig, relay, block, number, batch, doing)
        progress(block * len(rig.batches) + number + 1, len(rig.block_names) * len(rig.batches))


def _pass(rig: Rig, relay: Relay, block: int, number: int, batch: Batch, doing: Doing) -> None:
    """One batch through one block; with the true embedding back in place if the first block is told of it too."""
    try:
        relay.begin(block, number, doing)
        _forward(rig, batch)
    except Unfit:
        if block != 0 or number != 0 or not rig.recall_embedding():
            raise
        relay.begin(block, number, doing)
        _forward(rig, batch)
    relay.end()


def _forward(rig: Rig, batch: Batch) -> None:
    try:
        rig.forward(batch)
    except (MergerError, Unfit):
        raise
    except Exception as error:  # model code that meets stand-ins can fail in any way
        if lacks_memory(error):
            raise
        raise Unfit(f"{type(error).__name__}: {error}") from error


def whole(rig: Rig, progress: Progress) -> Results:
    """The whole model on every batch; its blocks are loaded when they are called and dropped after."""
    for name, block in zip(rig.block_names, rig.blocks, strict=True):
        block.register_forward_pre_hook(lambda *_, name=name: rig.loader.load(name, rig.weights))
        block.register_forward_hook(lambda *_, name=name: rig.loader.drop(name))
    rig.watch.on = True
    for number, batch in enumerate(rig.batches):
        with checkpoint_faults(f"{rig.label}: the model cannot be run on text, so take a method without calibration"):
            rig.forward(batch)
        progress(number + 1, len(rig.batches))
    yield "", rig.rest()


class Relay:
    """Stands in for all blocks of a model but one, in the forward pass that the model itself makes."""

    def __init__(self, blocks: Sequence[nn.Module], watch: Watch, carried: Carried) -> None:
        self._watch, self._carried = watch, carried
        self._forms: dict[int, int] = {}  # how long a tuple each block returns; 0 for a bare tensor
        self._told: list[Any] = []  # what the next block was told beside its hidden states, of the first batch
        for index, block in enumerate(blocks):
            block.forward = functools.partial(self._call, index, block.forward)

    def begin(self, block: int, batch: int, doing: Doing) -> None:
        """Says which block is real in the next pass, which batch goes through it, and what for."""
        self._block, self._batch, self._doing, self._next = block, batch, doing, 0
        self._watch.on = block == EMBEDDING

    def end(self) -> None:
        """Checks that the pass came as far as the real block."""
        if self._next <= self._block:
            raise Unfit(f"its block {self._next} is never called")

    def _call(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index != self._next:
            raise Unfit("its blocks do not follow one another")
        self._next += 1
        hidden, told = _parted(args, kwargs)
        if index < self._block:
            return self._as_block(index, hidden)
        if index > self._block:
            if self._batch == 0:
                self._told = told
            self._carried.put(self._batch, hidden)
            raise Stop
        if self._batch == 0 and not _same(told, self._told):
            raise Unfit("its blocks depend on one another by more than hidden states")
        args, kwargs = _put_back(args, kwargs, self._carried.get(self._batch, hidden.device))
        self._watch.on = self._doing != "carry"
        output = forward(*args, **kwargs)
        self._forms[index] = _form(output)
        if self._doing == "watch":
            raise Stop
        self._watch.on = True  # what comes after the last block is not in any
        return output

    def _as_block(self, index: int, hidden: Tensor) -> Any:
        length = self._forms[index]
        if self._batch == 0:
            hidden = hidden + self._block  # another value in every pass
        return (hidden, *[None] * (length - 1)) if length else hidden


def _parted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    """The hidden states among a block's arguments, and everything else."""
    if args:
        return args[0], tree_leaves((args[1:], kwargs))
    if "hidden_states" not in kwargs:
        raise Unfit(f"its blocks take {', '.join(kwargs) or 'nothing'}, and no hidden states")
    return kwargs["hidden_states"], tree_leaves({name: kwargs[name] for name in kwargs if name != "hidden_states"})


def _put_back(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def _form(output: Any) -> int:
    if isinstance(output, torch.Tensor):
        return 0
    if type(output) is not tuple or not isinstance(output[0], torch.Tensor):
        raise Unfit(f"its blocks return a {type(output).__name__}")
    return len(output)


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether a block was told the same twice; of objects such as an empty cache only the kind is compared."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return torch.equal(a, b)
        return type(a) is type(b) and (a == b or not isinstance(a, (bool, int, float, str)))

    return len(one) == len(other) and all(map(equal, one, other))


class Carried:
    """The hidden states between two blocks, batch by batch: in host memory, and above ``budget`` bytes in files.

    Copies to and from a GPU are in the order of its stream, and nobody looks at them here, so nobody waits for them.
    """

    def __init__(self, budget: int | None, folder: Path) -> None:
        self._left, self._folder = budget, folder
        self._kept: dict[int, Tensor] = {}

    def get(self, batch: int, device: torch.device) -> Tensor:
        """The hidden states that were put there last, on the device of the next block."""
        return sent(self._kept[batch], device)

    def put(self, batch: int, hidden: Tensor) -> None:
        """Copies the hidden states of a batch to their place.

        To keep the tensors themselves would cost no copy, but 100 MB of holes in the heap with the 135M model.
        """
        if batch not in self._kept:
            self._kept[batch] = self._room(batch, hidden)
        place = self._kept[batch]
        place.copy_(hidden, non_blocking=place.is_pinned())

    def _room(self, batch: int, hidden: Tensor) -> Tensor:
        size = buffer_bytes(hidden.nbytes, hidden.device)
        if self._left is None or size <= self._left:
            self._left = None if self._left is None else self._left - size
            return buffer(hidden.shape, hidden.dtype, hidden.device)
        file = str(self._folder / f"{batch}.bin")
        return torch.from_file(file, shared=True, size=hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
