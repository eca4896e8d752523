"""The map from the blocks of the output to blocks of the models, which `layers` of a recipe lay down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby

from merger.checkpoint.tensor_kinds import BlockName, TensorKinds, block_count, block_name
from merger.errors import CheckpointError
from merger.recipe.document import KeyPath
from merger.recipe.layers import Layer
from merger.recipe.recipe import Recipe

NO_ENTRY = "no entry of `layers` has its block"
"""The reason for which tensors of an input are left out."""
SHOWN = 8
"""The most entries of `layers` that a note shows."""


@dataclass(frozen=True)
class OutputBlock:
    """One block of the output."""

    layer: Layer  # the entry of the recipe that it comes from
    depth: Fraction  # from 0 at the entry's first block to 1 at its last
    sources: Mapping[str, int]  # by model: the number of the block that is read

    @property
    def origin(self) -> tuple[str, int]:
        """The model and the number of the block whose settings in config.json the block has."""
        label = self.layer.model or "base"
        return label, self.sources[label]


@dataclass(frozen=True)
class BlockMap:
    """The blocks of the output by blocks of the models; without `layers` a block has one number in all of them."""

    stack: str | None = None  # the list of the blocks, as model.layers; None without `layers`
    blocks: tuple[OutputBlock, ...] = ()

    def block(self, name: str) -> OutputBlock | None:
        """The block of a tensor of the output; None for a tensor outside the blocks, and without `layers`."""
        parts = self._parts(name)
        return None if parts is None else self.blocks[parts.number]

    def copies(self, name: str) -> bool:
        """Whether a tensor of the output is in a block that is copied."""
        block = self.block(name)
        return block is not None and block.layer.use is not None

    def stored_name(self, label: str, name: str) -> str:
        """The name under which a model stores the tensor that stands for a tensor of the output."""
        parts = self._parts(name)
        if parts is None:
            return name
        return parts._replace(number=self.blocks[parts.number].sources[label]).full

    def arranged(self, label: str, kinds: TensorKinds) -> TensorKinds:
        """The tensors of a model under the names of the output; those of a repeated block come as often."""
        if self.stack is None:
            return kinds
        outside = {name: info for name, info in kinds.tensors.items() if self._parts(name) is None}
        by_block: dict[int, list[BlockName]] = {}
        for parts in filter(None, map(self._parts, kinds.tensors)):
            by_block.setdefault(parts.number, []).append(parts)
        inside = {
            parts._replace(number=number).full: kinds.tensors[parts.full]
            for number, block in enumerate(self.blocks)
            for parts in by_block.get(block.sources.get(label, -1), ())
        }
        copies = {name: of for name, of in kinds.copies.items() if name in outside and of in outside}
        counts = {**kinds.blocks, self.stack: len(self.blocks)}
        return replace(kinds, tensors={**outside, **inside}, copies=copies, blocks=counts)

    def unused(self, label: str, kinds: TensorKinds) -> list[str]:
        """The tensors of a model whose block is in no entry."""
        used = {block.sources[label] for block in self.blocks if label in block.sources}
        return [name for name in kinds.tensors if (parts := self._parts(name)) is not None and parts.number not in used]

    def notes(self, recipe: Recipe, kinds: Mapping[str, TensorKinds]) -> Iterator[str]:
        """Says which blocks of the models the output has, and which are left out."""
        if self.stack is None:
            return
        start, entries = 0, []
        for layer in recipe.layers:
            ranges = layer.ranges(["base", *recipe.experts])
            sources = ", ".join(f"{label} {_span(numbers)}" for label, numbers in ranges.items())
            stop = start + len(next(iter(ranges.values())))
            verb = "merge" if layer.model is None else "copy" if layer.scale == 1 else "copy and scale"
            entries.append(f"{_span(range(start, stop))} {verb} {sources}")
            start = stop
        remainder = f"; and {len(entries) - SHOWN} more entries" if len(entries) > SHOWN else ""
        yield f"layers: {start} blocks of {self.stack}: {'; '.join(entries[:SHOWN])}{remainder}"
        unused = {label: self._unused_numbers(label, model) for label, model in kinds.items()}
        left_out = [f"{label} {', '.join(map(_span, runs(numbers)))}" for label, numbers in unused.items() if numbers]
        if left_out:
            yield f"layers: no entry has {'; '.join(left_out)}"

    def _unused_numbers(self, label: str, kinds: TensorKinds) -> list[int]:
        return sorted({parts.number for parts in map(self._parts, self.unused(label, kinds)) if parts is not None})

    def _parts(self, name: str) -> BlockName | None:
        """The parts of the name of a tensor in the blocks that `layers` are about."""
        parts = None if self.stack is None else block_name(name)
        return parts if parts is not None and parts.stack == self.stack else None


def block_map(recipe: Recipe, kinds: Mapping[str, TensorKinds]) -> BlockMap:
    """Returns the map of the recipe's `layers`; CheckpointError with all ranges that the models do not have."""
    if not recipe.layers:
        return BlockMap()
    stack = _stack(kinds["base"])
    if faults := list(_faults(recipe, kinds, stack)):
        raise CheckpointError("\n".join(faults))
    blocks = []
    for layer in recipe.layers:
        ranges = layer.ranges(kinds)
        count = len(next(iter(ranges.values())))
        for i in range(count):
            sources = {label: numbers[i] for label, numbers in ranges.items()}
            blocks.append(OutputBlock(layer, Fraction(i, max(1, count - 1)), sources))
    return BlockMap(stack, tuple(blocks))


def runs(numbers: list[int]) -> Iterator[range]:
    """The runs of consecutive numbers in an ascending list."""
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *further = [number for _, number in run]
        yield range(first, first + len(further) + 1)


def _span(numbers: range) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _stack(base: TensorKinds) -> str:
    """The list of blocks of the language model, as model.layers: as long as config.json says, beside the embedding."""
    if base.config.get("is_encoder_decoder"):
        raise CheckpointError("base: is an encoder-decoder; `layers` are for models with one list of blocks")
    count = block_count(base.config)
    stacks = [stack for stack, length in base.blocks.items() if length == count]
    if len(stacks) > 1 and base.embedding is not None:
        parent = base.embedding.removesuffix(".weight").rpartition(".")[0]
        stacks = [stack for stack in stacks if stack.rpartition(".")[0] == parent]
    if len(stacks) != 1:
        lists = ", ".join(f"{stack} with {length}" for stack, length in base.blocks.items()) or "no numbered blocks"
        raise CheckpointError(
            f"base: config.json says that there are {count or 'no'} blocks (num_hidden_layers or n_layer), and its "
            f"tensors have {lists}; `layers` need one list of as many blocks as config.json says"
        )
    return stacks[0]


def _faults(recipe: Recipe, kinds: Mapping[str, TensorKinds], stack: str) -> Iterator[str]:
    """Yields the ranges that end beyond the blocks of a model, with their lines."""
    for i, layer in enumerate(recipe.layers):
        for label, numbers in layer.ranges(kinds).items():
            path: KeyPath = ("layers", i, "range", *((label,) if isinstance(layer.range, Mapping) else ()))
            count = kinds[label].blocks.get(stack, 0)
            if count == 0:
                yield recipe.fault(path, f"{label} has no blocks {stack}.N, as base has")
            elif numbers.stop > count:
                last = f"ends behind block {count - 1}, the last one of {label}; write at most {count}"
                yield recipe.fault(path, f"[{numbers.start}, {numbers.stop}] {last}")
