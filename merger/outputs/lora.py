"""A fine-tune as a PEFT adapter: each matrix's change cut to its strongest directions, one matrix at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from merger._lazy import torch
from merger.checkpoint.adapter_config import CONFIG, lora_config
from merger.checkpoint.adapter_names import factor_names
from merger.checkpoint.files import write_json
from merger.checkpoint.folder import ADAPTER
from merger.checkpoint.growing_file import GrowingFile
from merger.checkpoint.opening import open_checkpoint
from merger.checkpoint.output import Output
from merger.checkpoint.placement import check_output
from merger.checkpoint.tensor_kinds import TensorKinds, tensor_kinds
from merger.engine.linear_modules import linear_modules
from merger.engine.machine import tuned
from merger.errors import CheckpointError, RecipeError
from merger.ops.factor_pair import FactorPair, factor_pair, squared_norm
from merger.ops.linalg import Factors, strongest, svd
from merger.options import Progress, RunOptions, check_options, path_argument
from merger.recipe.input_locations import check_models

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Layer:
    """The share of the changes that an adapter holds, for one transformer block or one matrix outside the blocks."""

    matrices: int
    ranks: tuple[int, int]  # the least and the largest
    error: float  # norm of what is not kept, as a share of that of the changes


@dataclass(frozen=True)
class LoraExtraction:
    """The result of `lora`: an adapter, and the share of the changes that it omits."""

    output: str
    parameters: int
    layers: dict[str, Layer]
    error: float  # over all matrices that it changes
    whole_error: float  # over all tensors of the model
    left_out: dict[str, float]  # what changed but is no such matrix: its share of the model's change, of squared norms

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return asdict(self)


class _Cut(NamedTuple):
    """The rank of one matrix's factors, and the squared norms of its change and of the omitted part."""

    rank: int
    change: float
    error: float


Cutter = Callable[["Tensor"], FactorPair]
"""Cuts a change [out, in] to lora_A and lora_B."""


def extract_lora(
    base: str,
    model: str,
    output: Path,
    options: RunOptions = RunOptions(),
    *,
    rank: int | None = None,
    energy: Fraction | None = None,
    force: bool = False,
) -> LoraExtraction:
    """Writes the change from ``base`` to ``model`` as a LoRA adapter into ``output``, which appears complete.

    Each linear layer gets the factors of rank ``rank`` nearest to its change, or of the least rank that keeps the
    share ``energy`` of its squared norm. Other tensors that changed are left out and reported. Raises a `MergerError`.
    """
    if (rank is None) == (energy is None):
        raise RecipeError("give either a rank or an energy")
    check_options(options)
    output = path_argument("output", output)
    check_models({"base": base, "model": model})
    with ExitStack() as stack:
        models: list[Checkpoint] = []
        for label, source in (("base", base), ("model", model)):
            checkpoint = open_checkpoint(
                source, None, label=label, folder=Path(), offline=options.offline, base=next(iter(models), None)
            )
            models.append(stack.enter_context(checkpoint))
        check_output(output, [checkpoint.directory for checkpoint in models], force=force)
        modules = linear_modules(models[0], trust_remote_code=options.trust_remote_code)
        _check_alike(*models)
        factor = partial(strongest, rank=rank) if rank is not None else partial(_of_energy, share=float(energy or 0))

        def cut(change: Tensor) -> FactorPair:
            return factor_pair(change, factor(change), min_rank=rank or 1)

        folder = Output(output, {"base": base, "model": model, "adapter": f"rank {rank}, energy {energy}"})
        try:
            folder.open(force=force)
            report = _write(folder.folder, base, models, modules, cut, options.progress)
            folder.finish(force=force)
        except BaseException:
            folder.abandon()
            raise
    adapter = LoraExtraction(str(output), **report)
    if (omitted := adapter.whole_error**2) > 0.5:
        options.notice(_omission(adapter, omitted))
    return adapter


def _omission(adapter: LoraExtraction, omitted: float) -> str:
    """The remark on an adapter that omits most of the change: which part of it, and what keeps more."""
    outside = sum(adapter.left_out.values())
    remedy = (
        "a higher rank keeps more" if outside <= omitted / 2 else "no rank keeps it; push or merge the model itself"
    )
    return (
        f"the adapter omits {omitted:.0%} of the squared change, {outside:.0%} in tensors that are no matrix of a "
        f"layer; {remedy}"
    )


def _write(
    folder: Path, source: str, models: Sequence[Checkpoint], modules: Mapping[str, str], cut: Cutter, progress: Progress
) -> dict[str, Any]:
    """Writes the two files of an adapter for the base ``source``; returns their fields of a `LoraExtraction`."""
    base, model = models
    with tuned(), closing(GrowingFile(folder / ADAPTER[0], _room(modules.values()))) as file:
        report = _extract(base, model, modules, file, cut, progress)
        file.finish()
    ranks = {module: file.tensors[factor_names(module)[0]].shape[0] for module in modules.values()}
    on_hub, transposed = base.commit is not None, bool(_kinds(base).conv1d)
    write_json(folder / CONFIG, lora_config(source, ranks, on_hub=on_hub, fan_in_fan_out=transposed))
    return {"parameters": sum(info.elements for info in file.tensors.values()), **report}


def _kinds(base: Checkpoint) -> TensorKinds:
    return tensor_kinds(base.tensors, base.config, base.equal)


def _check_alike(base: Checkpoint, model: Checkpoint) -> None:
    for name, info in base.tensors.items():
        if name not in model.tensors:
            raise CheckpointError(f"model: has no {name}, which the base has; is it a fine-tune of this base?")
        if model.tensors[name].shape != info.shape:
            raise CheckpointError(
                f"model: {name} is {list(model.tensors[name].shape)}, but {list(info.shape)} in base; "
                "an adapter changes values, not shapes"
            )


def _extract(
    base: Checkpoint,
    model: Checkpoint,
    modules: Mapping[str, str],
    file: GrowingFile,
    cut: Cutter,
    progress: Progress,
) -> dict[str, Any]:
    """Writes every matrix's factors to the file, in parallel; returns their fields of a `LoraExtraction`."""
    kinds = _kinds(base)
    other_tensors = [name for name, info in base.tensors.items() if name not in modules and info.is_float]
    other_changes = {name: squared_norm(_change(base, model, name, kinds)) for name in other_tensors}
    layers: dict[str, list[_Cut]] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1, "merger-lora") as pool:
        cuts = pool.map(lambda name: cut(_change(base, model, name, kinds)), modules)
        for count, (name, pair) in enumerate(zip(modules, cuts, strict=True), 1):
            for factor_name, factor in zip(factor_names(modules[name]), (pair.down, pair.up), strict=True):
                file.append(factor_name, factor)
            layers.setdefault(kinds.unit(name), []).append(_Cut(len(pair.down), pair.change, pair.error))
            progress("factoring", count, len(modules))
    matrices = [matrix for layer in layers.values() for matrix in layer]
    changed, error = sum(matrix.change for matrix in matrices), sum(matrix.error for matrix in matrices)
    total = changed + sum(other_changes.values())
    return {
        "layers": {unit: _layer(layer) for unit, layer in layers.items()},
        "error": _share(error, changed),
        "whole_error": _share(error + sum(other_changes.values()), total),
        "left_out": {name: square / total for name, square in other_changes.items() if square},
    }


def _layer(matrices: Sequence[_Cut]) -> Layer:
    ranks = [matrix.rank for matrix in matrices]
    error = _share(sum(matrix.error for matrix in matrices), sum(matrix.change for matrix in matrices))
    return Layer(len(matrices), (min(ranks), max(ranks)), error)


def _share(part: float, of: float) -> float:
    return math.sqrt(part / of) if of else 0.0


def _change(base: Checkpoint, model: Checkpoint, name: str, kinds: TensorKinds) -> Tensor:
    """Returns model - base in float32, a matrix as [out, in]."""
    change = model.read(name).float() - base.read(name).float()
    if not torch.isfinite(change).all():
        raise CheckpointError(f"model: {name} holds NaN or infinity, or the base does")
    return change.T if kinds.kind(name) == "conv1d" else change


def _of_energy(change: Tensor, share: float) -> Factors:
    factors = svd(change)
    energy = factors.values.square().cumsum(0)
    return factors.first(int((energy < share * energy[-1:] * (1 - 1e-12)).sum()) + 1)


def _room(modules: Collection[str]) -> int:
    """Bytes that the header of the factors' file takes at most."""
    return 64 + sum(2 * (len(json.dumps(module)) + 140) for module in modules)
