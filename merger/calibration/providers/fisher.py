"""The diagonal Fisher information of each expert's weights: a value for each, made by backward passes before the merge.

It is as large as the expert in float32, so it is a file of its own, kept for later runs and read as the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.calibration import statistics_files
from merger.calibration.origins import fingerprint, sources
from merger.calibration.provider import Cost, register
from merger.calibration.statistics import expert_samples
from merger.calibration.text_cost import activation_bytes, hidden_state_bytes, largest_block_bytes
from merger.checkpoint.cache import cache_folder
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.files import make_folder, replacing
from merger.checkpoint.formats.safetensors import FORMAT
from merger.checkpoint.growing_file import GrowingFile
from merger.options import RunOptions
from merger.pipeline.inputs import StageInput
from merger.planning.plan import Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.samples import Samples

HOLDS = "fisher"
"""What the file says that it holds, and how its name ends."""


@dataclass(frozen=True)
class _Rows:
    """The Fisher information of one matrix in all experts' files."""

    models: Sequence[Checkpoint]
    tensor: TensorPlan
    part: Part

    def read(self, rows: slice) -> Tensor:
        """The experts' values of some rows of the matrix: [k r c]."""
        return torch.stack([self._read(model, rows) for model in self.models])

    def _read(self, model: Checkpoint, rows: slice) -> Tensor:
        name = self.tensor.reads[model.label]
        assert name is not None, "only tensors that all experts have are read"
        row_map = self.tensor.row_maps.get(model.label)
        if row_map is not None:
            table = model.read(name)
            return row_map.gather(table.reshape(len(table), -1), self.part.rows)[rows]
        if self.part.transposed:
            return model.read(name).T[rows]
        return model.read_rows(name, rows.start, rows.stop)


def _by_stored_row(values: _Rows, rows: slice, features_are_rows: bool) -> Tensor:
    """A value for each element of each expert's tensor: [k r c]."""
    return values.read(rows)


@dataclass(frozen=True)
class FisherSource:
    """The files of all experts."""

    models: Mapping[str, Checkpoint]

    def of_part(self, tensor: TensorPlan, part: Part, note: Callable[[str], None]) -> Mapping[str, Any]:
        """The values of one matrix; nothing, and a note, where an expert has none."""
        if not any(item.name == "fisher" for item in tensor.inputs):
            return {}
        models = [self.models[name] for name in tensor.place.experts]
        if len(tensor.parts) == 1 and all(tensor.reads[model.label] in model.tensors for model in models):
            return {"fisher": _Rows(models, tensor, part)}
        label = tensor.name if tensor.unit == tensor.name else f"some tensors of {tensor.unit.rpartition('.')[0]}"
        note(f"{label}: transformers does not compute with them as they are stored; they are merged by their mean")
        return {}

    def only(self, tensors: Sequence[TensorPlan]) -> FisherSource:
        """All of it, for it is in files."""
        return self

    @property
    def nbytes(self) -> int:
        """Nothing that counts: slices are read as they are needed."""
        return 0


class Fisher:
    """A file an expert, as large as the expert in float32."""

    inputs = (StageInput("fisher", "model", _by_stored_row, needs_gradients=True),)
    supplies = frozenset({"fisher"})

    def cost(self, plan: Plan) -> Cost:
        """Counts a block with its gradients and their squares, and the hidden states before every block."""
        blocks = len({tensor.unit for tensor in plan.tensors if tensor.unit != tensor.name})
        return Cost(
            making=3 * largest_block_bytes(plan) + activation_bytes(plan),
            hidden_states=(blocks + 2) * hidden_state_bytes(plan, experts_at_once=1),
            cached=len(plan.recipe.experts) * sum(4 * tensor.info.elements for tensor in plan.tensors),
        )

    def slice_bytes(self, part: Part, experts: int) -> int:
        """The values of a slice, at most a matrix, in float32."""
        return 4 * experts * part.rows * part.columns

    def is_cached(self, key: statistics_files.StatisticsKey) -> bool:
        """Whether the expert's file is there."""
        return _cached_file(key).is_file()

    def origins(self, plan: Plan) -> Mapping[str, str | None]:
        """The SHA-256 of texts, files of Fisher information and tokenizers."""
        return sources(plan)

    def files(self, plan: Plan, options: RunOptions, hidden_memory: int | None) -> Mapping[str, Path]:
        """Each expert's file: the one the recipe names, one from an earlier run, or a new one."""
        calibration = plan.recipe.calibration
        assert calibration is not None, "the recipe was checked for it"
        paths = {name: plan.recipe.folder / Path(path).expanduser() for name, path in calibration.stats.items()}
        for name, path in paths.items():
            statistics_files.check_key(path, holds=HOLDS, checkpoint=fingerprint(plan.models[name]))
        for name in plan.recipe.experts:
            if name not in paths:
                key, samples = expert_samples(plan, name, options)
                paths[name] = _cached_file(key)
                if not paths[name].is_file():
                    _make(paths[name], plan.models[name], key, samples, options, hidden_memory)
        return {name: paths[name] for name in plan.recipe.experts}

    def open(self, plan: Plan, files: Mapping[str, Path]) -> FisherSource:
        """Opens the files."""
        models = {}
        for name, path in files.items():
            with path.open("rb") as file:
                tensors = FORMAT.parse(file, path.stat().st_size, path)
            models[name] = Checkpoint(name, path.parent, tensors, {})
        return FisherSource(models)


def _cached_file(key: statistics_files.StatisticsKey) -> Path:
    return cache_folder() / key.file_name().replace(".stats.", f".{HOLDS}.")


def _make(
    path: Path,
    model: Checkpoint,
    key: statistics_files.StatisticsKey,
    samples: Samples,
    options: RunOptions,
    hidden_memory: int | None,
) -> None:
    """Writes an expert's file, tensor by tensor as blocks are done."""
    from merger.calibration.backward_passes import separate_blocks  # they import torch
    from merger.calibration.fisher import fisher_blocks
    from merger.calibration.samples import pad_samples

    count = sum(map(len, samples.tokens))
    options.notice(f"backward passes of {model.label}: {len(samples.tokens)} samples, {count:,} tokens")
    batches = [pad_samples([tokens]) for tokens in samples.tokens]
    progress = partial(options.progress, f"gradients of {model.label}")
    make_folder(path.parent)
    with replacing(path) as new:
        metadata = statistics_files.metadata_of({**key.fields(), "holds": HOLDS})
        file = GrowingFile(new, 200 * len(model.tensors) + 4096, metadata)
        try:
            with separate_blocks(model.label, "there is no Fisher information of its weights"):
                for tensors in fisher_blocks(model, batches, key.settings, options, hidden_memory, progress):
                    for name, values in tensors.items():
                        file.append(name, values)
            file.finish()
        finally:
            file.close()


register(Fisher())
