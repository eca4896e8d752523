"""Gram matrices E[x x^T] of each matrix's inputs, made block by block while the model is merged.

They are as large as the models, so a block's matrices are dropped when the block is merged. With ``gram`` an expert's
text comes to a block through the expert's own earlier blocks (RegMean), with ``merged_gram`` through the merged ones
(RegMean++). ``draft_gram`` and ``cross_moment`` E[y x^T] are of the inputs x of a draft of the merged block behind the
merged blocks, and y of the expert's block behind the expert's blocks (FeatCal).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from merger.calibration.block_grams import grams
from merger.calibration.moment_source import MomentSource
from merger.calibration.origins import sources
from merger.calibration.provider import Block, Cost, PartialMerge, register
from merger.calibration.statistics_files import StatisticsKey, is_complete
from merger.calibration.text_cost import hidden_state_bytes, largest_block_bytes
from merger.checkpoint.cache import cache_folder
from merger.options import RunOptions
from merger.pipeline.inputs import StageInput, Stream, uncut
from merger.planning.plan import Part, Plan


class Grams:
    """All experts advance through their blocks together; a block is merged as soon as its matrices are made."""

    def __init__(self, stream: Stream, gram: str, cross: str | None = None) -> None:
        names = (gram,) if cross is None else (gram, cross)
        self._gram, self._cross, self._stream = gram, cross, stream
        self._models = 1 if cross is None else 2  # whose hidden states are in memory at once
        self.inputs = tuple(StageInput(name, "block", uncut, stream=stream) for name in names)
        self.supplies = frozenset({*names, "second_moment", "mean_input", "reached", "token_share"})

    def cost(self, plan: Plan) -> Cost:
        """Counts sums in float64 for one expert; the other experts' sums and a block's results wait in float32."""
        experts = len(plan.recipe.experts)
        squares, triangles = Counter[str](), 0
        for tensor in plan.tensors:
            if tensor.lockstep:
                squares[tensor.unit] += sum(part.columns**2 for part in tensor.parts)
                triangles += sum(part.columns * (part.columns + 1) // 2 for part in tensor.parts)
        matrices = len(self.inputs)
        beside = 2 if self._stream == "draft" else 0  # the draft itself, and the block of the model that runs on it
        sums = {unit: (8 + 4 * experts) * matrices * count for unit, count in squares.items()}
        return Cost(
            making=largest_block_bytes(plan, sums) + beside * largest_block_bytes(plan),
            merging=4 * experts * matrices * max(squares.values(), default=0),
            hidden_states=self._models * hidden_state_bytes(plan, experts_at_once=experts),
            files=4 * experts * triangles if self._stream == "own" else 0,
        )

    def slice_bytes(self, part: Part, experts: int) -> int:
        """The matrices of all experts in float32, and their sum and its factor in float64."""
        return (16 + 4 * experts * len(self.inputs)) * part.columns**2

    def is_cached(self, key: StatisticsKey) -> bool:
        """Whether `merger calibrate --gram` kept the expert's matrices; behind merged blocks none can be kept."""
        return self._stream == "own" and is_complete(cache_folder() / key.folder_name())

    def origins(self, plan: Plan) -> Mapping[str, str | None]:
        """The SHA-256 of texts, statistics files and tokenizers."""
        return sources(plan)

    def blocks(
        self, plan: Plan, options: RunOptions, hidden_memory: int | None, merge: PartialMerge
    ) -> Iterator[Block]:
        """See `grams`."""
        for tensors, statistics in grams(plan, options, hidden_memory, merge, self._stream):
            yield tensors, MomentSource(statistics, self._gram, self._cross)


register(Grams("own", "gram"))
register(Grams("merged", "merged_gram"))
register(Grams("draft", "draft_gram", "cross_moment"))
