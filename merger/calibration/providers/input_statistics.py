"""Means over calibration text of each layer's inputs: E[x_j^2] and E[x_j], and how often a token is looked up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merger.calibration.moment_source import MomentSource
from merger.calibration.origins import sources
from merger.calibration.provider import Cost, register
from merger.calibration.statistics import calibrate, load_statistics
from merger.calibration.statistics_files import StatisticsKey, find
from merger.calibration.text_cost import hidden_state_bytes, largest_block_bytes
from merger.checkpoint.cache import cache_folder
from merger.options import RunOptions
from merger.pipeline.inputs import StageInput, by_expert, by_feature, by_row
from merger.planning.plan import Part, Plan


class InputStatistics:
    """One small file an expert, made by forward passes block by block before the merge, and kept for later ones."""

    inputs = (
        StageInput("second_moment", "model", by_feature),
        StageInput("mean_input", "model", by_feature),
        StageInput("reached", "model", by_expert),
        StageInput("token_share", "model", by_row),
    )
    supplies = frozenset(stage_input.name for stage_input in inputs)

    def cost(self, plan: Plan) -> Cost:
        """An expert's largest block in float32, and the hidden states of its samples."""
        return Cost(making=largest_block_bytes(plan), hidden_states=hidden_state_bytes(plan, experts_at_once=1))

    def slice_bytes(self, part: Part, experts: int) -> int:
        """Nothing that counts: a few numbers for each column."""
        return 0

    def is_cached(self, key: StatisticsKey) -> bool:
        """Whether the expert's statistics file is there."""
        return find(cache_folder(), key) is not None

    def origins(self, plan: Plan) -> Mapping[str, str | None]:
        """The SHA-256 of texts, statistics files and tokenizers."""
        return sources(plan)

    def files(self, plan: Plan, options: RunOptions, hidden_memory: int | None) -> Mapping[str, Path]:
        """See `calibrate`."""
        return calibrate(plan, options, hidden_memory)

    def open(self, plan: Plan, files: Mapping[str, Path]) -> MomentSource:
        """Reads the statistics files."""
        return MomentSource(load_statistics(plan, files))


register(InputStatistics())
