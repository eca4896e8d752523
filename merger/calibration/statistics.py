"""The statistics that saliency needs: read from the recipe's files, from an earlier run, or made by calibration."""

from __future__ import annotations

from collections.abc import Container, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.calibration import Settings, batches, collect
from merger.calibration import samples as texts
from merger.calibration import statistics_files as files
from merger.calibration.input_fit import check_blocks, check_inputs
from merger.calibration.moments import Moments, Statistics
from merger.calibration.origins import fingerprint, tokenizer_digest
from merger.calibration.settings import ForwardPass
from merger.checkpoint.cache import cache_folder
from merger.checkpoint.tokenizers import tokenizer_folder
from merger.options import RunOptions
from merger.planning.plan import Plan

if TYPE_CHECKING:
    from merger.calibration.weights import TensorSource


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
        files.load_file(path, layers=layers(plan, name), checkpoint=fingerprint(plan.models[name]))
    sample_sets = {name: expert_samples(plan, name, options) for name in plan.recipe.experts if name not in paths}
    folder = cache_folder()
    for name, (key, samples) in sample_sets.items():
        paths[name] = folder / key.file_name()
        if files.find(folder, key) is None:
            options.notice(
                f"calibrating {name}: {len(samples.tokens)} samples, {sum(map(len, samples.tokens)):,} tokens"
            )
            files.save(paths[name], _collect_statistics(plan, name, key, samples, options, hidden_memory), key)
    return {name: paths[name] for name in plan.recipe.experts}


def expert_samples(plan: Plan, name: str, options: RunOptions) -> tuple[files.StatisticsKey, texts.Samples]:
    """Returns the key of an expert's statistics, and the samples of its own text in its own tokens."""
    settings, samples = expert_text(plan, name, options)
    return statistics_key(plan, name, settings, samples, options), samples


def statistics_key(
    plan: Plan, name: str, settings: Settings, samples: texts.Samples, options: RunOptions
) -> files.StatisticsKey:
    """Returns the key of the statistics of an expert on these samples; hashes its weights if nothing did before."""
    model, forward = plan.models[name], ForwardPass.of(plan.models[name], options.device)
    return files.StatisticsKey(fingerprint(model), samples.data, tokenizer_digest(model), settings, forward)


def expert_text(plan: Plan, name: str, options: RunOptions) -> tuple[Settings, texts.Samples]:
    """Returns the settings of an expert's calibration, and the samples of its own text in its own tokens."""
    calibration = plan.recipe.calibration
    assert calibration is not None, "the recipe was checked for it"
    folder = tokenizer_folder(plan.models[name])
    tokenizer = texts.load_tokenizer(folder, name, trust_remote_code=options.trust_remote_code)
    settings = Settings(
        samples=calibration.samples_of(name),
        max_tokens=calibration.max_tokens,
        weighting=calibration.weighting,
        skip_first_tokens=calibration.skip_first_tokens,
        calib_text=calibration.calib_text,
        seed=plan.recipe.seed,
    )
    return settings, texts.load_samples(calibration.sources(name), plan.recipe.folder, tokenizer, settings)


def _collect_statistics(
    plan: Plan, name: str, key: files.StatisticsKey, samples: texts.Samples, *run_arguments: Any
) -> dict[str, Moments]:
    moments = {
        tensor_name: tensor_moments
        for _, block in expert_blocks(plan, name, key, samples, *run_arguments)
        for tensor_name, tensor_moments in block.items()
    }
    # a layer that the text never reached is on record as such, so that a file that lacks one is known to be damaged
    empty_moments = Moments(count=torch.zeros((), dtype=torch.int64))
    return {**dict.fromkeys(layers(plan, name), empty_moments), **moments}


def expert_blocks(
    plan: Plan,
    name: str,
    key: files.StatisticsKey,
    samples: texts.Samples,
    options: RunOptions,
    hidden_memory: int | None,
    *,
    gram: bool = False,
    merged_weights: TensorSource | None = None,
    finished_units: Container[str] = (),
) -> Generator[tuple[str, dict[str, Moments]], None, None]:
    """Yields the moments of an expert's inputs block by block; raises CheckpointError if a matrix has another shape."""
    blocks = collect(
        plan.models[name],
        batches(samples.tokens),
        key.settings,
        device=options.device,
        hidden_memory=hidden_memory,
        trust_remote_code=options.trust_remote_code,
        gram=gram,
        merged_weights=merged_weights,
        finished_units=finished_units,
        notice=options.notice,
        progress=partial(options.progress, f"calibrating {name}"),
    )
    return check_blocks(plan, name, blocks)


def statistics_keys(plan: Plan, options: RunOptions) -> dict[str, files.StatisticsKey]:
    """Returns the statistics key of every expert whose model runs for a plan."""
    calibration = plan.recipe.calibration
    if calibration is None or not plan.runs_models:
        return {}
    in_files = {} if plan.follows_merge else calibration.stats
    return {name: expert_samples(plan, name, options)[0] for name in plan.recipe.experts if name not in in_files}


def keep_grams(plan: Plan, options: RunOptions, hidden_memory: int | None, to: Path | None) -> dict[str, Path]:
    """Each expert's folder of statistics with Gram matrices, in ``to`` or in the cache; goes on with unfinished ones.

    They are as large as the models. Raises as `calibrate` does.
    """
    folders = {}
    for name in plan.recipe.experts:
        key, samples = expert_samples(plan, name, options)
        folder = to / f"{name}{files.GRAMS}" if to else cache_folder() / key.folder_name()
        folders[name] = folder
        finished_units = files.finished_units(folder, key)
        if files.is_complete(folder):
            continue
        options.notice(
            f"calibrating {name}: {len(samples.tokens)} samples; {len(finished_units)} blocks are there already"
        )
        blocks = expert_blocks(
            plan, name, key, samples, options, hidden_memory, gram=True, finished_units=finished_units
        )
        for number, (unit, moments) in enumerate(blocks, len(finished_units)):
            files.save_block(folder, number, unit, moments, key)
    return folders


def layers(plan: Plan, expert: str) -> list[str]:
    """Returns the names of the expert's tensors whose inputs a stage uses."""
    tensors = (t for t in plan.tensors if t.inputs and not t.lockstep)
    names = (t.reads.get(expert) for t in tensors if t.is_layer)
    return sorted({name for name in names if name is not None})


def load_statistics(plan: Plan, paths: Mapping[str, Path]) -> dict[str, Statistics]:
    """Reads the experts' statistics files; CheckpointError where they do not fit the plan's tensors."""
    statistics: dict[str, Statistics] = {name: files.load_file(path) for name, path in paths.items()}
    for name, moments in statistics.items():
        check_inputs(plan, name, moments)
    return statistics
