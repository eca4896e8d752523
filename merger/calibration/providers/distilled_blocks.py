"""Parameters of a block that were learned from the experts' outputs of that block, made while the model is merged.

They are as large as the block, so they are dropped when it is merged. The moments of the block's inputs come with them,
for methods that the learning starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from merger.calibration.moment_source import MomentSource
from merger.calibration.origins import sources
from merger.calibration.provider import Block, Cost, PartialMerge, register
from merger.calibration.providers.grams import Grams
from merger.calibration.statistics_files import StatisticsKey
from merger.calibration.text_cost import activation_bytes, largest_block_bytes
from merger.options import RunOptions
from merger.pipeline.inputs import StageInput, by_coefficient_row, by_matrix_row
from merger.planning.plan import Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

_DRAFTS = Grams("draft", "draft_gram", "cross_moment")


@dataclass(frozen=True)
class LearnedSource:
    """What was learned of a block by the output's names, and the moments of its inputs."""

    moments: MomentSource
    learned: Mapping[str, Tensor]

    def of_part(self, tensor: TensorPlan, part: Part, note: Callable[[str], None]) -> Mapping[str, Tensor]:
        """The inputs of one matrix or vector; notes the matrices of blocks that were not learned."""
        inputs = self.moments.of_part(tensor, part, note)
        values = self.learned.get(tensor.name)
        if values is None:
            if tensor.is_layer and not tensor.follows_blocks:
                label = f"some layers of {tensor.unit.rpartition('.')[0]}"
                note(f"{label}: transformers does not compute with them as they are stored; they are not learned")
            return inputs
        if any(item.name == "coefficients" for item in tensor.inputs):
            return {**inputs, "coefficients": values}
        matrix = values.reshape(-1, values.shape[-1])
        return {**inputs, "learned": matrix.T if part.transposed else matrix}

    def only(self, tensors: Sequence[TensorPlan]) -> LearnedSource:
        """The inputs of these tensors alone."""
        names = {tensor.name for tensor in tensors}
        learned = {name: values for name, values in self.learned.items() if name in names}
        return LearnedSource(self.moments.only(tensors), learned)

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        return self.moments.nbytes + sum(values.nbytes for values in self.learned.values())


class DistilledBlocks:
    """All experts advance through their blocks together; a block is merged as soon as its weights are learned."""

    inputs = (
        StageInput("learned", "block", by_matrix_row, stream="draft", needs_gradients=True),
        StageInput(
            "coefficients", "block", by_coefficient_row, stream="draft", needs_gradients=True, of_task_vectors=True
        ),
    )
    supplies = frozenset({"learned", "coefficients", *_DRAFTS.supplies})

    def cost(self, plan: Plan) -> Cost:
        """Counts, beside what Gram matrices take, a block with gradients and Adam's two moments, and activations.

        Coefficients have task vectors beside them, and as many elements where there is one for each.
        """
        grams = any(item.name == "draft_gram" for item in plan.inputs)
        block, drafts = largest_block_bytes(plan), _DRAFTS.cost(plan)
        coefficients = any(item.name == "coefficients" for item in plan.inputs)
        learning = (4 + 5 * len(plan.recipe.experts) * coefficients) * block + activation_bytes(plan)
        making = drafts.making if grams else 3 * block  # the expert's block, the draft, and the model that runs on it
        return replace(drafts, making=making + learning, merging=(drafts.merging if grams else 0) + block)

    def slice_bytes(self, part: Part, experts: int) -> int:
        """Nothing beside the block's weights."""
        return 0

    def is_cached(self, key: StatisticsKey) -> bool:
        """No: they are dropped with their block."""
        return False

    def origins(self, plan: Plan) -> Mapping[str, str | None]:
        """The SHA-256 of texts, statistics files and tokenizers."""
        return sources(plan)

    def blocks(
        self, plan: Plan, options: RunOptions, hidden_memory: int | None, merge: PartialMerge
    ) -> Iterator[Block]:
        """See `distilled`."""
        from merger.calibration.distillation import distilled  # it imports torch

        for tensors, statistics, learned in distilled(plan, options, hidden_memory, merge):
            yield tensors, LearnedSource(MomentSource(statistics, "draft_gram", "cross_moment"), learned)


register(DistilledBlocks())
