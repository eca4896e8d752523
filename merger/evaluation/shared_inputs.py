"""Stage inputs that one merge in memory leaves to the next: statistics files, and Gram matrices while there is room."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merger.calibration.statistics import Merged, Statistics
from merger.engine.prepare import Block, StageInputs
from merger.planning.plan import Plan, TensorPlan

GRAM_MEMORY = 4 << 30
"""Bytes of Gram matrices that are kept for the next merge; more are made anew for each."""

NamedBlock = tuple[list[str], Mapping[str, Statistics]]
"""The names of a block's tensors, with their Gram matrices."""


@dataclass(frozen=True)
class InputCache:
    """What merges in memory have needed so far, by what it was made from."""

    statistics: dict[str, Mapping[str, Path]] = field(default_factory=dict)
    grams: dict[str, list[NamedBlock]] = field(default_factory=dict)


@dataclass(frozen=True)
class SharedInputs(StageInputs):
    """The stage inputs of a plan, taken from the cache, or made and put there."""

    cache: InputCache

    def find_statistics(self) -> Mapping[str, Path]:
        """The experts' statistics files, looked for once for all merges of the same experts and text."""
        key = _sources(self.plan)
        if key not in self.cache.statistics:
            self.cache.statistics[key] = super().find_statistics()
        return self.cache.statistics[key]

    def blocks(self, merged: Merged) -> Iterator[Block]:
        """The Gram matrices block by block: those of an earlier merge, or new ones, which are kept while they fit."""
        tensors = {tensor.name: tensor for tensor in self.plan.tensors if tensor.gram}
        key = json.dumps([_sources(self.plan), sorted(tensors)])
        if key in self.cache.grams:
            for names, statistics in self.cache.grams[key]:
                yield [tensors[name] for name in names], statistics
            return
        if any(tensor.fed_by_merged for tensor in tensors.values()):  # they hold for this merge alone
            yield from super().blocks(merged)
            return
        blocks: list[NamedBlock] = []
        size = 0
        for block, statistics in super().blocks(merged):
            needed = _needed(block, statistics)
            size += _gram_bytes(needed)
            if size <= GRAM_MEMORY:
                blocks.append(([tensor.name for tensor in block], needed))
            else:
                blocks.clear()
            yield block, statistics
        if size <= GRAM_MEMORY:
            self.cache.grams[key] = blocks


def _sources(plan: Plan) -> str:
    """All that calibration depends on, as far as the recipe says it."""
    recipe = plan.recipe
    sources = recipe.model_dump(mode="json", include={"base", "experts", "calibration", "seed"})
    return json.dumps([str(recipe.folder), sources])


def _needed(tensors: Sequence[TensorPlan], statistics: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """The statistics of these tensors alone."""
    return {
        expert: {name: moments[name] for tensor in tensors if (name := tensor.reads[expert] or "") in moments}
        for expert, moments in statistics.items()
    }


def _gram_bytes(statistics: Mapping[str, Statistics]) -> int:
    """Bytes of the Gram matrices; layers that share an input share one matrix."""
    moments = (layer for expert in statistics.values() for layer in expert.values())
    grams = [layer.gram for layer in moments if layer.gram is not None]
    return sum({gram.untyped_storage().data_ptr(): gram.nbytes for gram in grams}.values())
