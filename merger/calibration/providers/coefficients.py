"""Coefficients of each expert's task vectors, one a tensor, learned by gradients through the merged model.

They are small: a file for each expert, kept for later runs, and enough to rebuild the merge without text or gradients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.calibration import batches, statistics_files
from merger.calibration.descent import INPUT, Descent, start, takes_coefficients
from merger.calibration.origins import fingerprint, sources
from merger.calibration.provider import Cost, register
from merger.calibration.statistics import expert_samples
from merger.calibration.text_cost import activation_bytes, hidden_state_bytes, largest_block_bytes
from merger.checkpoint.cache import cache_folder
from merger.errors import CheckpointError, RecipeError
from merger.options import RunOptions
from merger.pipeline.inputs import StageInput, by_expert
from merger.planning.plan import Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

HOLDS = "coefficients"
"""What the files say that they hold, and how their names end."""


@dataclass(frozen=True)
class CoefficientSource:
    """The coefficients [1] of each expert's tensors, by the output's names."""

    values: Mapping[str, Mapping[str, Tensor]]

    def of_part(self, tensor: TensorPlan, part: Part, note: Callable[[str], None]) -> Mapping[str, Tensor]:
        """The experts' coefficients [k 1] of a tensor; none where it takes none, or none were learned."""
        if not takes_coefficients(tensor) or any(tensor.name not in values for values in self.values.values()):
            return {}
        return {INPUT: torch.stack([self.values[expert][tensor.name] for expert in tensor.place.experts])}

    def only(self, tensors: Sequence[TensorPlan]) -> CoefficientSource:
        """All of them, for they are few."""
        return self

    @property
    def nbytes(self) -> int:
        """A number for each tensor and expert."""
        return 4 * sum(map(len, self.values.values()))


class Coefficients:
    """A number for each expert and tensor, learned before the merge."""

    inputs = (StageInput(INPUT, "model", by_expert, needs_gradients=True, of_task_vectors=True),)
    supplies = frozenset({INPUT})

    def cost(self, plan: Plan) -> Cost:
        """Counts a block with its gradients, its base and a task vector, and the hidden states before every block."""
        blocks = len({tensor.unit for tensor in plan.tensors if tensor.unit != tensor.name})
        experts = len(plan.recipe.experts)
        return Cost(
            making=(experts + 4) * largest_block_bytes(plan) + activation_bytes(plan),
            hidden_states=(blocks + 2) * hidden_state_bytes(plan, experts_at_once=experts),
        )

    def slice_bytes(self, part: Part, experts: int) -> int:
        """Nothing that counts."""
        return 0

    def is_cached(self, key: statistics_files.StatisticsKey) -> bool:
        """No: that cannot be said of one expert, for they are learned together."""
        return False

    def origins(self, plan: Plan) -> Mapping[str, str | None]:
        """The SHA-256 of texts, files of coefficients and tokenizers."""
        return sources(plan)

    def files(self, plan: Plan, options: RunOptions, hidden_memory: int | None) -> Mapping[str, Path]:
        """Each expert's file: those that the recipe names, those of an earlier run, or new ones."""
        calibration, experts = plan.recipe.calibration, list(plan.recipe.experts)
        assert calibration is not None, "the recipe was checked for it"
        if missing := [name for name in experts if name not in calibration.stats]:
            if calibration.stats:
                reason = "coefficients are learned together: name the files of all experts, or of none"
                raise RecipeError(f"calibration.stats: has no {', '.join(missing)}; {reason}")
            return _learned(plan, options, hidden_memory)
        paths = {name: plan.recipe.folder / Path(calibration.stats[name]).expanduser() for name in experts}
        for name, path in paths.items():
            statistics_files.check_key(path, holds=HOLDS, checkpoint=fingerprint(plan.models[name]))
        return paths

    def open(self, plan: Plan, files: Mapping[str, Path]) -> CoefficientSource:
        """Reads the files; CheckpointError where one lacks a tensor."""
        values = {name: statistics_files.load_values(path) for name, path in files.items()}
        for tensor in _learners(plan):
            for expert in tensor.place.experts:
                if tensor.name not in values[expert]:
                    raise CheckpointError(f"{files[expert]}: has no coefficient of {tensor.name}; learn them again")
        return CoefficientSource(values)


def _learners(plan: Plan) -> list[TensorPlan]:
    """The tensors that are learned; CheckpointError where their rows are other tokens in some expert."""
    tensors = [tensor for tensor in plan.tensors if takes_coefficients(tensor) and _is_in_all(plan, tensor)]
    aligned = next((tensor.name for tensor in tensors if any(tensor.row_maps.values())), None)
    if aligned:
        raise CheckpointError(
            f"{aligned}: the experts have other tokens in its rows, and coefficients are learned where all have the "
            "same; use a method that needs no gradients, such as featcal"
        )
    return tensors


def _is_in_all(plan: Plan, tensor: TensorPlan) -> bool:
    """Whether all models have a tensor in one shape; coefficients of others stay at their start."""
    labels = ("base", *tensor.place.experts)
    stored = [plan.models[label].tensors.get(tensor.reads[label] or "") for label in labels]
    return len({None if info is None else info.shape for info in stored} | {tensor.info.shape}) == 1


def _learned(plan: Plan, options: RunOptions, hidden_memory: int | None) -> Mapping[str, Path]:
    """The files of an earlier run with the same inputs, or new ones."""
    from merger.calibration.merging_coefficients import BATCH, learn_coefficients  # it imports torch

    tensors = _learners(plan)
    descents = {Descent.of(tensor) for tensor in tensors}
    if len(descents) > 1:
        raise RecipeError(
            "coefficients are learned together, so all rules must give the same steps, rate and objective"
        )
    texts = {name: expert_samples(plan, name, options) for name in plan.recipe.experts}
    descent, fields = descents.pop(), {name: key.fields() for name, (key, _) in texts.items()}
    decisive = [fingerprint(plan.base), fields, asdict(descent), {tensor.name: start(tensor) for tensor in tensors}]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
    paths = {name: cache_folder() / f"{digest}.{number}.{HOLDS}.safetensors" for number, name in enumerate(texts)}
    if not all(path.is_file() for path in paths.values()):
        options.notice(f"learning {len(tensors)} coefficients of each expert in {descent.steps} steps")
        inputs = {name: (key.settings, batches(samples.tokens, BATCH)) for name, (key, samples) in texts.items()}
        for name, values in learn_coefficients(plan, tensors, descent, inputs, options, hidden_memory).items():
            statistics_files.write(paths[name], values, {**fields[name], "holds": HOLDS, "learned": digest})
    return paths


register(Coefficients())
