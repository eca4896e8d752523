"""A fine-tune as a PEFT adapter: each matrix's change cut to its strongest directions, one matrix at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from merger._lazy import torch
from merger.checkpoint.adapter_config import CONFIG
from merger.checkpoint.folder import ADAPTER
from merger.checkpoint.opening import open_checkpoint
from merger.checkpoint.tensor_kinds import TensorKinds, tensor_kinds
from merger.checkpoint.writer import check_output, partial_of, write_json
from merger.engine.machine import tuned
from merger.errors import CheckpointError, RecipeError, ResourceError
from merger.ops.linalg import Factors, strongest, svd
from merger.options import Progress, RunOptions

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Layer:
    """What an adapter keeps of the changes in one transformer block, or of one matrix outside them."""

    matrices: int
    ranks: tuple[int, int]  # the least and the largest
    error: float  # norm of what is not kept, as a share of that of the changes


@dataclass(frozen=True)
class LoraExtraction:
    """An adapter that was written, and what it leaves out."""

    output: str
    parameters: int
    layers: dict[str, Layer]
    error: float  # over all matrices that it changes
    whole_error: float  # over all tensors of the model
    left_out: dict[str, float]  # what changed but is no such matrix: its share of the model's change, of squared norms

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return asdict(self)


class _Kept(NamedTuple):
    """What one matrix's factors keep: their rank, and squared norms of its change and of what is left of it."""

    rank: int
    change: float
    left: float


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
    """Writes the change from ``base`` to ``model`` as a LoRA adapter into the folder ``output``, whole or not at all.

    Each linear layer gets the factors of rank ``rank`` nearest to its change, or of the least rank that keeps the
    share ``energy`` of its squared norm. Other tensors that changed are left out and told. Raises a `MergerError`.
    """
    if (rank is None) == (energy is None):
        raise RecipeError("give either a rank or an energy")
    with ExitStack() as opened:
        models = [
            opened.enter_context(open_checkpoint(source, None, label=label, folder=Path(), offline=options.offline))
            for label, source in (("base", base), ("model", model))
        ]
        check_output(output, [each.directory for each in models], force=force)
        modules = _modules(models[0], options.trust_remote_code)
        _check_alike(*models)
        factor = partial(strongest, rank=rank) if rank is not None else partial(_of_energy, share=float(energy or 0))
        with tuned(), _AdapterFile(output, modules.values()) as file:
            found = _extract(models[0], models[1], modules, file, partial(_cut, factor, rank or 1), options.progress)
            write_json(file.folder / CONFIG, _config(base, file.ranks, _kinds(models[0])))
            file.finish(force=force)
    return LoraExtraction(str(output), file.parameters, **found)


def _modules(base: Checkpoint, trust_remote_code: bool) -> dict[str, str]:
    """The linear layers that an adapter can change: the checkpoint's name of the weight, and the module's own."""
    from merger.calibration.model import build
    from merger.calibration.names import locate

    model = build(base, trust_remote_code=trust_remote_code)
    tied = model.get_output_embeddings() if _kinds(base).tied else None
    groups = locate(model, base.tensors)
    found = {}
    for name, module in model.named_modules():
        group = groups.get(f"{name}.weight")
        if type(module).__name__ in ("Linear", "Conv1D") and module is not tied and group is not None:
            sources = [source for _, source in group.names]
            if len(sources) == 1 and group.converter is None:
                found[sources[0]] = name
    if not found:
        raise CheckpointError("base: has no linear layer that an adapter could change")
    return found


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
    file: _AdapterFile,
    cut: Callable[[Tensor], tuple[Tensor, Tensor, _Kept]],
    progress: Progress,
) -> dict[str, Any]:
    """Sends every matrix's factors to the file, several side by side; what an `LoraExtraction` says of them."""
    kinds = _kinds(base)
    rest = [name for name, info in base.tensors.items() if name not in modules and info.is_float]
    others = {name: _square(_change(base, model, name, kinds)) for name in rest}
    layers: dict[str, list[_Kept]] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1, "merger-lora") as pool:
        cuts = pool.map(lambda name: cut(_change(base, model, name, kinds)), modules)
        for done, (name, (down, up, kept)) in enumerate(zip(modules, cuts, strict=True), 1):
            file.add(modules[name], down, up)
            layers.setdefault(kinds.unit(name), []).append(kept)
            progress("factoring", done, len(modules))
    every = [kept for several in layers.values() for kept in several]
    changed, left, beside = sum(k.change for k in every), sum(k.left for k in every), sum(others.values())
    return {
        "layers": {unit: _layer(several) for unit, several in layers.items()},
        "error": _share(left, changed),
        "whole_error": _share(left + beside, changed + beside),
        "left_out": {name: square / (changed + beside) for name, square in others.items() if square},
    }


def _layer(several: Sequence[_Kept]) -> Layer:
    ranks = [kept.rank for kept in several]
    error = _share(sum(kept.left for kept in several), sum(kept.change for kept in several))
    return Layer(len(several), (min(ranks), max(ranks)), error)


def _share(part: float, of: float) -> float:
    return math.sqrt(part / of) if of else 0.0


def _change(base: Checkpoint, model: Checkpoint, name: str, kinds: TensorKinds) -> Tensor:
    """model - base in float32, a matrix as [out, in]."""
    change = model.read(name).float() - base.read(name).float()
    if not torch.isfinite(change).all():
        raise CheckpointError(f"model: {name} holds NaN or infinity, or the base does")
    return change.T if kinds.kind(name) == "conv1d" else change


def _cut(factor: Callable[[Tensor], Factors], least: int, change: Tensor) -> tuple[Tensor, Tensor, _Kept]:
    """lora_A [r in] and lora_B [out r] as they are stored, of a rank of ``least`` at least, and what they keep."""
    factors = factor(change)
    root = factors.values.sqrt()
    down, up = (factors.right * root).T.float().contiguous(), (factors.left * root).float().contiguous()
    missing = min(least, *change.shape) - len(root)
    if missing > 0:  # it changed in fewer directions, or not at all
        down, up = torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
    return down, up, _Kept(len(down), _square(change), _square(change - up @ down))


def _square(change: Tensor) -> float:
    """The squared norm."""
    return float(change.double().square().sum())


def _of_energy(change: Tensor, share: float) -> Factors:
    factors = svd(change)
    kept = factors.values.square().cumsum(0)
    return factors.first(int((kept < share * kept[-1:] * (1 - 1e-12)).sum()) + 1)


# --- the adapter's files ----------------------------------------------------------------------------


def _config(base: str, ranks: Mapping[str, int], kinds: TensorKinds) -> dict[str, Any]:
    """adapter_config.json as peft reads it: a scale of 1 for every layer, whatever its rank."""
    rank = max(ranks.values())
    others = {module: own for module, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": bool(kinds.conv1d),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


class _AdapterFile:
    """A folder in the making whose weight file takes factors as they come; gone on leaving unless it was finished.

    A safetensors header stands before the data and is known last, so room is left for it.
    """

    def __init__(self, output: Path, modules: Collection[str]) -> None:
        self.output, self.folder = output, partial_of(output)
        self.ranks: dict[str, int] = {}
        self.parameters = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._room = 64 + sum(2 * (len(json.dumps(module)) + 140) for module in modules)
        try:
            if self.folder.is_dir():  # of a run that was killed
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            self._file = (self.folder / ADAPTER[0]).open("wb")
        except OSError as error:
            raise ResourceError(f"{self.folder}: cannot be made: {error.strerror}") from None

    def __enter__(self) -> _AdapterFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, module: str, down: Tensor, up: Tensor) -> None:
        """Writes the two factors of a module."""
        self.ranks[module] = len(down)
        for factor, values in (("lora_A", down), ("lora_B", up)):
            start, end = 4 * self.parameters, 4 * (self.parameters + values.numel())
            self._header[f"base_model.model.{module}.{factor}.weight"] = {
                "dtype": "F32",
                "shape": list(values.shape),
                "data_offsets": [start, end],
            }
            self._write(8 + self._room + start, values.numpy().tobytes())
            self.parameters += values.numel()

    def _write(self, position: int, content: bytes) -> None:
        try:
            self._file.seek(position)
            self._file.write(content)
        except OSError as error:
            raise ResourceError(f"{self.folder}: cannot be written: {error.strerror}") from None

    def finish(self, *, force: bool) -> None:
        """Writes the header and gives the folder its name; what ``force`` replaces is gone only after that."""
        text = json.dumps(self._header, separators=(",", ":")).encode()
        self._write(0, self._room.to_bytes(8, "little") + text.ljust(self._room))
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            old = self.output.with_name(f"{self.output.name}.old")
            if force and self.output.is_dir():
                self.output.rename(old)
            self.folder.rename(self.output)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise ResourceError(f"{self.output}: cannot be written: {error.strerror}") from None
