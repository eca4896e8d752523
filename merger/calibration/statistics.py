"""The statistics that saliency needs: read from the recipe's files, from an earlier run, or made by calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.calibration import Settings, batches, collect
from merger.calibration import samples as texts
from merger.calibration import statistics_files as files
from merger.calibration.input_fit import check_blocks, check_inputs
from merger.calibration.moments import Moments
from merger.calibration.settings import ForwardPass
from merger.checkpoint.cache import cache_folder
from merger.checkpoint.hashes import config_digest, sha256
from merger.checkpoint.tokenizers import Tokenizer, tokenizer_folder
from merger.options import RunOptions
from merger.planning.plan import Part, Plan, TensorPlan
from merger.recipe.recipe import Recipe, portable_location

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.provider import MergedTensors
    from merger.checkpoint.checkpoint import Checkpoint

Statistics = Mapping[str, Moments]
"""The moments of each matrix's inputs of one expert, by the expert's own tensor names."""


def calibrate(plan: Plan, options: RunOptions, hidden_memory: int | None) -> dict[str, Path]:
    """Each expert's statistics file: the one the recipe names, one from an earlier run, or a new one.

    Forward passes run on ``options.device``, which is a definite device. Hidden states above ``hidden_memory`` bytes
    wait in files. All experts' data and tokenizers are looked at before the first forward pass. Raises
    CheckpointError for data or statistics that cannot be used, or an activation that is not finite.
    """
    calibration = plan.recipe.calibration
    assert calibration is not None, "the recipe was checked for it"
    paths = {name: plan.recipe.folder / Path(path).expanduser() for name, path in calibration.stats.items()}
    for name, path in paths.items():
        files.load(path, layers=layers(plan, name), checkpoint=fingerprint(plan.models[name]))
    sample_sets = {name: _expert_samples(plan, name, options) for name in plan.recipe.experts if name not in paths}
    folder = cache_folder()
    for name, (key, samples) in sample_sets.items():
        paths[name] = folder / key.file_name()
        if files.find(folder, key) is None:
            options.notice(
                f"calibrating {name}: {len(samples.tokens)} samples, {sum(map(len, samples.tokens)):,} tokens"
            )
            files.save(paths[name], _collect_statistics(plan, name, key, samples, options, hidden_memory), key)
    return {name: paths[name] for name in plan.recipe.experts}


def _expert_samples(plan: Plan, name: str, options: RunOptions) -> tuple[files.StatisticsKey, texts.Samples]:
    """Returns the key of an expert's statistics, and the samples of its own text in its own tokens."""
    calibration = plan.recipe.calibration
    assert calibration is not None, "the recipe was checked for it"
    model = plan.models[name]
    folder = tokenizer_folder(model)
    tokenizer = texts.load_tokenizer(folder, name, trust_remote_code=options.trust_remote_code)
    settings = Settings(
        samples=calibration.samples_of(name),
        max_tokens=calibration.max_tokens,
        weighting=calibration.weighting,
        skip_first_tokens=calibration.skip_first_tokens,
        calib_text=calibration.calib_text,
        seed=plan.recipe.seed,
    )
    samples = texts.load(calibration.sources(name), plan.recipe.folder, tokenizer, settings)
    forward = ForwardPass.of(model, options.device)
    return files.StatisticsKey(fingerprint(model), samples.data, tokenizer_digest(model), settings, forward), samples


def _collect_statistics(
    plan: Plan, name: str, key: files.StatisticsKey, samples: texts.Samples, *run_arguments: Any
) -> dict[str, Moments]:
    moments = {
        tensor_name: tensor_moments
        for _, block in _blocks(plan, name, key, samples, *run_arguments)
        for tensor_name, tensor_moments in block.items()
    }
    # a layer that the text never reached is on record as such, so that a file that lacks one is known to be damaged
    empty_moments = Moments(count=torch.zeros((), dtype=torch.int64))
    return {**dict.fromkeys(layers(plan, name), empty_moments), **moments}


def _blocks(
    plan: Plan,
    name: str,
    key: files.StatisticsKey,
    samples: texts.Samples,
    options: RunOptions,
    hidden_memory: int | None,
    *,
    gram: bool = False,
    merged_weights: PartlyMergedModel | None = None,
    finished_units: Container[str] = (),
) -> Iterator[tuple[str, dict[str, Moments]]]:
    """Yields the moments of an expert's inputs block by block; raises CheckpointError if a matrix has another shape."""
    blocks = collect(
        plan.models[name],
        batches(samples.tokens),
        key.settings,
        device=options.device,
        host_memory=hidden_memory,
        trust_remote_code=options.trust_remote_code,
        gram=gram,
        merged_weights=merged_weights,
        finished_units=finished_units,
        notice=options.notice,
        progress=partial(options.progress, f"calibrating {name}"),
    )
    return check_blocks(plan, name, blocks)


class PartlyMergedModel:
    """The merged model under an expert's names; tensors that are not merged yet are the expert's own."""

    def __init__(self, plan: Plan, expert: str, merged: MergedTensors) -> None:
        self._own, self._merged = plan.models[expert], merged
        self._tensors = {
            own_name: tensor for tensor in plan.tensors if (own_name := tensor.reads.get(expert)) is not None
        }
        self._expert = expert

    def read(self, name: str) -> Tensor:
        """Returns a whole tensor in the expert's own shape.

        Rows of its vocabulary that were dropped, or that are another token in the output, stay its own.
        """
        tensor = self._tensors.get(name)
        merged = self._merged(name if tensor is None else tensor.name)
        if merged is None:
            return self._own.read(name)
        foreign = [rows for rows in (tensor.extra if tensor else ()) if self._expert not in rows.models]
        if merged.shape == self._own.tensors[name].shape and not foreign:
            return merged
        expert_values = self._own.read(name).to(merged.dtype)
        values = expert_values.clone()
        common = min(len(expert_values), len(merged))
        values[:common] = merged[:common]
        for rows in foreign:
            values[rows.start : rows.stop] = expert_values[rows.start : rows.stop]
        return values


def grams(
    plan: Plan, options: RunOptions, hidden_memory: int | None, merged: MergedTensors
) -> Iterator[tuple[list[TensorPlan], Mapping[str, Statistics]]]:
    """Yields the tensors that take Gram matrices, with these matrices; all experts advance together, block by block.

    A block's matrices are dropped when the caller asks for the next block. Where stages need inputs that follow the
    merged blocks, ``merged`` returns the tensors of these blocks by then. Tensors that no input reached come last,
    without matrices. Raises as `calibrate` does.
    """
    waiting = [tensor for tensor in plan.tensors if tensor.lockstep]
    experts = tuple(plan.recipe.experts) if waiting else ()
    follows_merge = any(item.follows_merge for tensor in waiting for item in tensor.inputs)
    merged_models = {
        name: PartlyMergedModel(plan, name, merged) if follows_merge else None for name in plan.recipe.experts
    }
    gram_folders = _gram_folders(plan, options) if waiting and not follows_merge else {}
    memory = hidden_memory and hidden_memory // len(plan.recipe.experts)
    sample_sets = {name: _expert_samples(plan, name, options) for name in experts if name not in gram_folders}
    streams = [
        check_blocks(plan, name, files.blocks(gram_folders[name], checkpoint=fingerprint(plan.models[name])))
        if name in gram_folders
        else _blocks(plan, name, *sample_sets[name], options, memory, gram=True, merged_weights=merged_models[name])
        for name in experts
    ]
    moments_by_expert: dict[str, dict[str, Moments]] = {name: {} for name in experts}
    for expert_blocks in zip_longest(*streams, fillvalue=("", {})):
        for expert_moments, (_, moments) in zip(moments_by_expert.values(), expert_blocks, strict=True):
            expert_moments.update(moments)
        complete_tensors = [
            t
            for t in waiting
            if all(t.reads[name] in expert_moments for name, expert_moments in moments_by_expert.items())
        ]
        yield complete_tensors, moments_by_expert
        for tensor in complete_tensors:
            waiting.remove(tensor)
            for name, expert_moments in moments_by_expert.items():
                expert_moments.pop(tensor.reads[name] or "", None)
    yield waiting, {name: {} for name in moments_by_expert}


def _gram_folders(plan: Plan, options: RunOptions) -> dict[str, Path]:
    """Returns the folders of Gram matrices that the recipe names, or that `keep_grams` made from the same text."""
    calibration = plan.recipe.calibration
    assert calibration is not None, "the recipe was checked for it"
    folders = {}
    for name in plan.recipe.experts:
        if name in calibration.stats:
            folders[name] = plan.recipe.folder / Path(calibration.stats[name]).expanduser()
        else:
            key, _ = _expert_samples(plan, name, options)
            folder = cache_folder() / key.folder_name()
            if files.is_complete(folder):
                folders[name] = folder
    return folders


def statistics_keys(plan: Plan, options: RunOptions) -> dict[str, files.StatisticsKey]:
    """Returns the statistics key of every expert whose model runs for a plan."""
    calibration = plan.recipe.calibration
    if calibration is None or not plan.runs_models:
        return {}
    in_files = {} if plan.follows_merge else calibration.stats
    return {name: _expert_samples(plan, name, options)[0] for name in plan.recipe.experts if name not in in_files}


def keep_grams(plan: Plan, options: RunOptions, hidden_memory: int | None, to: Path | None) -> dict[str, Path]:
    """Each expert's folder of statistics with Gram matrices, in ``to`` or in the cache; goes on with unfinished ones.

    They are as large as the models. Raises as `calibrate` does.
    """
    folders = {}
    for name in plan.recipe.experts:
        key, samples = _expert_samples(plan, name, options)
        folder = to / f"{name}{files.GRAMS}" if to else cache_folder() / key.folder_name()
        folders[name] = folder
        finished_units = files.finished_units(folder, key)
        if files.is_complete(folder):
            continue
        options.notice(
            f"calibrating {name}: {len(samples.tokens)} samples; {len(finished_units)} blocks are there already"
        )
        blocks = _blocks(plan, name, key, samples, options, hidden_memory, gram=True, finished_units=finished_units)
        for number, (unit, moments) in enumerate(blocks, len(finished_units)):
            files.save_block(folder, number, unit, moments, key)
    return folders


def layers(plan: Plan, expert: str) -> list[str]:
    """Returns the names of the expert's tensors whose inputs a stage uses."""
    tensors = (t for t in plan.tensors if t.inputs and not t.lockstep)
    names = (t.reads[expert] for t in tensors if t.is_layer)
    return sorted({name for name in names if name is not None})


def fingerprint(model: Checkpoint) -> str:
    """The SHA-256 of a checkpoint's weight files with their names, and of the config keys of the forward pass."""
    lines = [*sorted(f"{file.name} {sha256(file)}\n" for file in model.files), f"config {config_digest(model)}\n"]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load(plan: Plan, paths: Mapping[str, Path]) -> dict[str, Statistics]:
    """Reads the experts' statistics files; CheckpointError where they do not fit the plan's tensors."""
    statistics: dict[str, Statistics] = {name: files.load(path) for name, path in paths.items()}
    for name, moments in statistics.items():
        check_inputs(plan, name, moments)
    return statistics


# --- from statistics to a stage's inputs ----------------------------------------------------------


@dataclass(frozen=True)
class MomentSource:
    """Statistics of all experts as inputs of stages; ``gram`` is the name under which stages take Gram matrices."""

    statistics: Mapping[str, Statistics]
    gram: str = "gram"

    def of_part(self, tensor: TensorPlan, part: Part, note: Callable[[str], None]) -> Mapping[str, Tensor]:
        """The inputs of one matrix, [k ...]; none where an expert has none."""
        if not tensor.inputs or not (tensor.is_layer or tensor.kind == "embedding"):
            return {}
        by_expert = [self.statistics[name].get(tensor.reads[name] or "") for name in tensor.place.experts]
        experts = [_of_part(moments, tensor, part) for moments in by_expert if moments is not None]
        if len(experts) < len(by_expert) or (
            tensor.is_layer and any(expert_moments.second_moment is None for expert_moments in experts)
        ):
            _note_unseen(tensor, note)
            return {}
        shares = [moments.token_share for moments in experts if moments.token_share is not None]
        if tensor.kind == "embedding":  # an expert that ties its own has the moments of its head as well
            complete = len(shares) == len(experts)
            return {"token_share": torch.stack([share[: part.rows] for share in shares])} if complete else {}
        second_moments = [moments.second_moment for moments in experts if moments.second_moment is not None]
        means = [moments.mean for moments in experts if moments.mean is not None]
        if not len(second_moments) == len(means) == len(experts):
            return {}
        _note_unreached(second_moments, tensor, part, note)
        grams = [moments.gram for moments in experts if moments.gram is not None]
        second_moment = torch.stack(second_moments)
        return {
            "second_moment": _replace_zeros(second_moment),
            "mean_input": _replace_zeros(torch.stack(means)),
            "reached": (second_moment != 0).any(1, keepdim=True),
            **({self.gram: torch.stack(grams)} if len(grams) == len(experts) else {}),
        }

    def only(self, tensors: Sequence[TensorPlan]) -> MomentSource:
        """The statistics of these tensors alone."""
        statistics = {
            expert: {name: moments[name] for tensor in tensors if (name := tensor.reads[expert] or "") in moments}
            for expert, moments in self.statistics.items()
        }
        return MomentSource(statistics, self.gram)

    @property
    def nbytes(self) -> int:
        """Bytes of the Gram matrices; layers that share an input share one matrix."""
        moments = (layer for expert in self.statistics.values() for layer in expert.values())
        grams = [layer.gram for layer in moments if layer.gram is not None]
        return sum({gram.untyped_storage().data_ptr(): gram.nbytes for gram in grams}.values())


def _of_part(moments: Moments, tensor: TensorPlan, part: Part) -> Moments:
    """The moments of the matrix of one packed expert, or of the whole tensor where it is a single matrix."""
    if tensor.kind != "expert3d" or moments.second_moment is None or moments.mean is None:
        return moments
    e = tensor.parts.index(part)
    gram = None if moments.gram is None else moments.gram[e]
    return Moments(moments.count[e], moments.second_moment[e], moments.mean[e], gram)


def _replace_zeros(values: Tensor) -> Tensor:
    """The values [k c], with ones for an expert that has only zeros: its text never reached the matrix."""
    return values.masked_fill(~(values != 0).any(1, keepdim=True), 1)


def _note_unseen(tensor: TensorPlan, note: Callable[[str], None]) -> None:
    """Notes layers that no forward pass reached, such as an image tower's, once for each list of blocks."""
    if tensor.is_layer:
        label = tensor.name if tensor.unit == tensor.name else f"some layers of {tensor.unit.rpartition('.')[0]}"
        note(f"{label}: calibration saw no input; their changes are judged without it")


def _note_unreached(
    second_moments: Sequence[Tensor], tensor: TensorPlan, part: Part, note: Callable[[str], None]
) -> None:
    """Notes the experts whose text sent no token to a matrix; a stage sees them by its input `reached`."""
    expert_moments = zip(tensor.place.experts, second_moments, strict=True)
    experts = [name for name, moments in expert_moments if not moments.any()]
    if experts:
        note(f"{part.name}: no input ever reached it in {', '.join(experts)}; its changes are judged without it")


def origin(paths: Mapping[str, Path]) -> dict[str, Any]:
    """The SHA-256 of each statistics file, for the manifest."""
    return {name: files.digest(path) for name, path in paths.items()}


def sources(plan: Plan) -> dict[str, str | None]:
    """The SHA-256 of what calibration starts from: files of text and statistics, tokenizers; None for a Hub dataset."""
    calibration = plan.recipe.calibration
    if calibration is None or not plan.inputs:
        return {}
    calibrated_experts = [name for name in plan.recipe.experts if name not in calibration.stats]
    tokenizers = {f"tokenizer of {name}": tokenizer_digest(plan.models[name]) for name in calibrated_experts}
    return {**tokenizers, **calibration_files(plan.recipe)}


def tokenizer_digest(model: Checkpoint) -> str:
    """The SHA-256 of the part of a model's tokenizer that decides ids."""
    return Tokenizer(tokenizer_folder(model)).digest


def calibration_files(recipe: Recipe) -> dict[str, str | None]:
    """The SHA-256 of the files of text and statistics that a recipe names; None for a Hub dataset."""
    calibration = recipe.calibration
    if calibration is None:
        return {}
    digests: dict[str, str | None] = {}
    for name in recipe.experts:
        stats = calibration.stats
        sources = [stats[name]] if name in stats else [text.file for text in calibration.sources(name)]
        for source in sources:
            path, label = recipe.folder / Path(source).expanduser(), portable_location(source)
            digest = files.digest(path) if path.exists() else None
            is_another = digests.get(label, digest) != digest  # a file of the same name in another folder
            digests[f"{label} of {name}" if is_another else label] = digest
    return digests
