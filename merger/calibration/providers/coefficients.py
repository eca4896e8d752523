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
        """The experts' coefficients [k 1] of a tensor; none, and a note, where none were learned."""
        if not takes_coefficients(tensor):
            return {}
        if any(tensor.name not in self.values[expert] for expert in tensor.place.experts):
            label = tensor.name if tensor.unit == tensor.name else f"some tensors of {tensor.unit.rpartition('.')[0]}"
            note(
                f"{label}: transformers does not compute with them as they are stored; their coefficients stay at start"
            )
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
        common = {"holds": HOLDS, "base": fingerprint(plan.base)}
        for name, path in paths.items():
            statistics_files.check_key(path, **common, checkpoint=fingerprint(plan.models[name]))
            common["learned"] = statistics_files.load_key(paths[experts[0]])["learned"]
        return paths

    def open(self, plan: Plan, files: Mapping[str, Path]) -> CoefficientSource:
        """Reads the files."""
        return CoefficientSource({name: statistics_files.load_values(path) for name, path in files.items()})


def _learners(plan: Plan) -> list[TensorPlan]:
    """The tensors that take coefficients.

    CheckpointError where their rows are other tokens in some expert, RecipeError where another method merges others.
    """
    merged = [tensor for tensor in plan.tensors if tensor.stages and tensor.parts]
    tensors = [tensor for tensor in merged if takes_coefficients(tensor)]
    if other := next((tensor.name for tensor in merged if not takes_coefficients(tensor)), None):
        raise RecipeError(
            f"{other}: is merged by another method, but coefficients are learned through the whole merged model; "
            "copy it by `use: base`, or leave it to the method that learns"
        )
    aligned = next((tensor.name for tensor in tensors if any(tensor.row_maps.values())), None)
    if aligned:
        raise CheckpointError(
            f"{aligned}: the experts have other tokens in its rows, and coefficients are learned where all have the "
            "same; use a method that needs no gradients, such as featcal"
        )
    return tensors


def _learned(plan: Plan, options: RunOptions, hidden_memory: int | None) -> Mapping[str, Path]:
    """The files of an earlier run with the same inputs, or new ones."""
    from merger.calibration.merging_coefficients import BATCH, learn_coefficients  # it imports torch

    tensors = _learners(plan)
    descents = {Descent.of(tensor) for tensor in tensors}
    if len(descents) > 1:
        raise RecipeError(
            "coefficients are learned together, so all rules must give the same steps, rate and objective"
        )
    descent = descents.pop()
    if descent.per == "model" and len({start(tensor) for tensor in tensors}) > 1:
        raise RecipeError("start: varies, but with per: model an expert has one coefficient for all tensors")
    texts = {name: expert_samples(plan, name, options) for name in plan.recipe.experts}
    base, fields = fingerprint(plan.base), {name: key.fields() for name, (key, _) in texts.items()}
    decisive = [base, list(fields.items()), asdict(descent), {tensor.name: start(tensor) for tensor in tensors}]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
    paths = {name: cache_folder() / f"{digest}.{number}.{HOLDS}.safetensors" for number, name in enumerate(texts)}
    if not all(path.is_file() for path in paths.values()):
        options.notice(f"learning {len(tensors)} coefficients of each expert in {descent.steps} steps")
        inputs = {name: (key.settings, batches(samples.tokens, BATCH)) for name, (key, samples) in texts.items()}
        for name, values in learn_coefficients(plan, tensors, descent, inputs, options, hidden_memory).items():
            statistics_files.write(
                paths[name], values, {**fields[name], "holds": HOLDS, "base": base, "learned": digest}
            )
    return paths


register(Coefficients())
