"""Stage inputs that one merge in memory leaves to the next: statistics files, and Gram matrices while there is room."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from merger.calibration.provider import Block, BlockProvider, ModelProvider, PartialMerge, Provider, Source
from merger.engine.prepare import StageInputs
from merger.planning.plan import Plan

BLOCK_MEMORY = 4 << 30
"""Bytes of a block provider's inputs that are kept for the next merge; more are made anew for each."""

NamedBlock = tuple[list[str], Source]
"""The names of a block's tensors, with their inputs."""


@dataclass(frozen=True)
class InputCache:
    """The inputs that merges in memory have needed so far, by what they were made from."""

    files: dict[str, Mapping[str, Path]] = field(default_factory=dict)
    blocks: dict[str, list[NamedBlock]] = field(default_factory=dict)


@dataclass(frozen=True)
class SharedInputs(StageInputs):
    """The stage inputs of a plan, taken from the cache, or made and put there."""

    cache: InputCache

    def find(self, provider: ModelProvider) -> Mapping[str, Path]:
        """The files of a provider, looked for once for all merges of the same experts and text.

        What is learned depends on the stage that learns it too, and has a cache of its own.
        """
        if any(stage_input.of_task_vectors for stage_input in provider.inputs):
            return super().find(provider)
        key = _key(self.plan, provider)
        if key not in self.cache.files:
            self.cache.files[key] = super().find(provider)
        return self.cache.files[key]

    def blocks(self, provider: BlockProvider, merge: PartialMerge) -> Iterator[Block]:
        """The inputs block by block: those of an earlier merge, or new ones, which are kept while they fit."""
        tensors = {tensor.name: tensor for tensor in self.plan.tensors if tensor.lockstep}
        key = json.dumps([_key(self.plan, provider), sorted(tensors)])
        if key in self.cache.blocks:
            for names, source in self.cache.blocks[key]:
                yield [tensors[name] for name in names], source
            return
        if any(stage_input.follows_merge for stage_input in provider.inputs):  # they hold for this merge alone
            yield from super().blocks(provider, merge)
            return
        blocks: list[NamedBlock] = []
        size = 0
        for block, source in super().blocks(provider, merge):
            block_source = source.only(block)
            size += block_source.nbytes
            if size <= BLOCK_MEMORY:
                blocks.append(([tensor.name for tensor in block], block_source))
            else:
                blocks.clear()
            yield block, source
        if size <= BLOCK_MEMORY:
            self.cache.blocks[key] = blocks


def _key(plan: Plan, provider: Provider) -> str:
    """All that a provider's inputs depend on, as far as the recipe says it."""
    recipe = plan.recipe
    origin = recipe.model_dump(mode="json", include={"base", "experts", "calibration", "seed"})
    return json.dumps([sorted(provider.supplies), str(recipe.folder), origin])
