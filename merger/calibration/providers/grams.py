"""Gram matrices E[x x^T] of each matrix's inputs, made block by block while the model is merged.

They are as large as the models, so a block's matrices are dropped when the block is merged. With ``gram`` an expert's
text comes to a block through the expert's own earlier blocks (RegMean), with ``merged_gram`` through the merged ones
(RegMean++).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from merger.calibration.block_grams import grams
from merger.calibration.moment_source import MomentSource
from merger.calibration.origins import sources
from merger.calibration.provider import Block, Cost, MergedTensors, register
from merger.calibration.text_cost import hidden_state_bytes, largest_block_bytes
from merger.options import RunOptions
from merger.pipeline.inputs import StageInput, uncut
from merger.planning.plan import Part, Plan


class Grams:
    """All experts advance through their blocks together; a block is merged as soon as its matrices are made."""

    def __init__(self, name: str, *, follows_merge: bool) -> None:
        self.inputs = (StageInput(name, "block", uncut, follows_merge=follows_merge),)
        self.supplies = frozenset({name, "second_moment", "mean_input", "reached", "token_share"})

    def cost(self, plan: Plan) -> Cost:
        """Counts sums in float64 for one expert; the other experts' sums and a block's results wait in float32."""
        experts = len(plan.recipe.experts)
        squares, triangles = Counter[str](), 0
        for tensor in plan.tensors:
            if tensor.lockstep:
                squares[tensor.unit] += sum(part.columns**2 for part in tensor.parts)
                triangles += sum(part.columns * (part.columns + 1) // 2 for part in tensor.parts)
        return Cost(
            making=largest_block_bytes(plan, {unit: (8 + 4 * experts) * count for unit, count in squares.items()}),
            merging=4 * experts * max(squares.values(), default=0),
            hidden_states=hidden_state_bytes(plan, experts_at_once=experts),
            files=4 * experts * triangles,
        )

    def slice_bytes(self, part: Part, experts: int) -> int:
        """The matrices of all experts in float32, and their sum and its factor in float64."""
        return (16 + 4 * experts) * part.columns**2

    def origins(self, plan: Plan) -> Mapping[str, str | None]:
        """The SHA-256 of texts, statistics files and tokenizers."""
        return sources(plan)

    def blocks(
        self, plan: Plan, options: RunOptions, hidden_memory: int | None, merged: MergedTensors
    ) -> Iterator[Block]:
        """See `grams`."""
        for tensors, statistics in grams(plan, options, hidden_memory, merged):
            yield tensors, MomentSource(statistics, self.inputs[0].name)


register(Grams("gram", follows_merge=False))
register(Grams("merged_gram", follows_merge=True))
