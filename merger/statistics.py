"""The statistics that a merge's saliency needs: read from files, found from an earlier run, or made by calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.cache import cache_folder
from merger.calibration import Settings, batches, collect_all, files, texts
from merger.calibration.moments import Moments
from merger.checkpoint import manifest
from merger.checkpoint.hashes import sha256
from merger.pipeline import Inputs
from merger.planning import Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.stored import Checkpoint

Statistics = Mapping[str, Moments]
"""What enters each matrix of one expert, by the expert's own tensor names."""


@dataclass(frozen=True)
class Options:
    """How calibration is run on this machine; none of it changes what is found beyond rounding."""

    device: str = "cpu"
    host_memory: int | None = None  # bytes of hidden states; more wait in files
    trust_remote_code: bool = False
    cache: Path | None = None  # None: the user's own cache folder


def calibrate(
    plan: Plan,
    options: Options,
    *,
    notice: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> dict[str, Path]:
    """Each expert's statistics file: the one the recipe names, one from an earlier run, or a new one.

    All experts' data and tokenizers are looked at before the first forward pass. Raises
    CheckpointError for data or statistics that cannot be used, or an activation that is not finite.
    """
    given = plan.recipe.calibration
    assert given is not None, "the recipe was checked for it"
    found = {name: plan.recipe.folder / Path(path).expanduser() for name, path in given.stats.items()}
    for name, path in found.items():
        files.load(path, layers=layers(plan, name), checkpoint=fingerprint(plan.models[name]))
    wanted = {name: _samples(plan, name, options) for name in plan.recipe.experts if name not in found}
    folder = options.cache or cache_folder()
    for name, (key, samples) in wanted.items():
        found[name] = folder / key.file_name()
        if files.find(folder, key) is None:
            notice(f"calibrating {name}: {len(samples.tokens)} samples, {sum(map(len, samples.tokens)):,} tokens")
            files.save(found[name], _run(plan, name, key, samples, options, notice, progress), key)
    return {name: found[name] for name in plan.recipe.experts}


def _samples(plan: Plan, name: str, options: Options) -> tuple[files.Key, texts.Samples]:
    """An expert's own text as its own tokens, and the key of what will be found from it."""
    given = plan.recipe.calibration
    assert given is not None, "the recipe was checked for it"
    source = given.data[name] if isinstance(given.data, dict) else given.data
    assert source is not None, "the recipe was checked for it"
    model = plan.models[name]
    own, base = (
        texts.load_tokenizer(each.directory, each.label, trust_remote_code=options.trust_remote_code)
        for each in (model, plan.base)
    )
    texts.check_same_tokens(base, own, name)
    settings = Settings(
        samples=given.samples.get(name, 100) if isinstance(given.samples, dict) else given.samples,
        max_tokens=given.max_tokens,
        weighting=given.weighting,
        skip_first_tokens=given.skip_first_tokens,
        calib_text=given.calib_text,
        seed=plan.recipe.seed,
    )
    samples = texts.load(source, plan.recipe.folder, own, settings)
    return files.Key(fingerprint(model), samples.data, texts.tokenizer_hash(model.directory), settings), samples


def _run(
    plan: Plan,
    name: str,
    key: files.Key,
    samples: texts.Samples,
    options: Options,
    notice: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> dict[str, Moments]:
    moments = collect_all(
        plan.models[name],
        batches(samples.tokens),
        key.settings,
        device=options.device,
        host_memory=options.host_memory,
        trust_remote_code=options.trust_remote_code,
        notice=notice,
        progress=lambda done, total: progress(f"calibrating {name}", done, total),
    )
    # a layer that the text never reached is on record as such, so that a file that lacks one is known to be damaged
    unreached = Moments(count=torch.zeros((), dtype=torch.int64))
    return {**dict.fromkeys(layers(plan, name), unreached), **moments}


def layers(plan: Plan, expert: str) -> list[str]:
    """The expert's tensors whose inputs some stage looks at."""
    read = (t.reads[expert] for t in plan.tensors if t.calibrated and t.kind not in ("vector", "other", "embedding"))
    return sorted({name for name in read if name is not None})


def fingerprint(model: Checkpoint) -> str:
    """The SHA-256 of the names and SHA-256s of a checkpoint's weight files."""
    lines = sorted(f"{file.name} {sha256(file)}\n" for file in model.files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load(plan: Plan, paths: Mapping[str, Path]) -> dict[str, Statistics]:
    """Reads the experts' statistics files."""
    return {name: files.load(path) for name, path in paths.items()}


# --- from statistics to a stage's inputs ----------------------------------------------------------


def inputs_of(
    tensor: TensorPlan, part: Part, statistics: Mapping[str, Statistics], device: str, notice: Callable[[str], None]
) -> Inputs:
    """What the stages of one part of a tensor may know of its inputs: [k c], or nothing where an expert has none."""
    if not tensor.calibrated:
        return Inputs()
    several = [statistics[name].get(tensor.reads[name] or "") for name in tensor.place.experts]
    if any(each is None for each in several):
        return Inputs()
    known = [_of_part(each, tensor, part) for each in several if each is not None]
    moments = [each.second_moment for each in known if each.second_moment is not None]
    means = [each.mean for each in known if each.mean is not None]
    shares = [each.token_share for each in known if each.token_share is not None]
    if len(moments) == len(means) == len(known):
        return Inputs(_reached(moments, tensor, part, notice).to(device), torch.stack(means).to(device))
    if len(shares) == len(known):
        return Inputs(token_share=torch.stack([share[: part.rows] for share in shares]).to(device))
    return Inputs()


def _of_part(moments: Moments, tensor: TensorPlan, part: Part) -> Moments:
    """One expert slice's row of a packed tensor's moments."""
    if tensor.kind != "expert3d" or moments.second_moment is None or moments.mean is None:
        return moments
    e = part.row // part.rows
    return Moments(moments.count[e], moments.second_moment[e], moments.mean[e])


def _reached(moments: Sequence[Tensor], tensor: TensorPlan, part: Part, notice: Callable[[str], None]) -> Tensor:
    """The second moments; all ones, which scores by magnitude, where no token got there (methods.md 2.1)."""
    silent = [name for name, each in zip(tensor.place.experts, moments, strict=True) if not each.any()]
    if silent:
        notice(f"{part.name}: no input ever reached it in {', '.join(silent)}; its changes are judged by magnitude")
    return torch.stack([each if each.any() else torch.ones_like(each) for each in moments])


def origin(paths: Mapping[str, Path]) -> dict[str, Any]:
    """The SHA-256 of each statistics file, for the manifest."""
    return {name: sha256(path) for name, path in paths.items()}


def sources(plan: Plan) -> dict[str, str | None]:
    """The SHA-256 of what calibration starts from: files of text and statistics, tokenizers; None for a Hub dataset."""
    given = plan.recipe.calibration
    if given is None or not plan.calibrated:
        return {}
    data = dict(given.data) if isinstance(given.data, dict) else dict.fromkeys(plan.recipe.experts, given.data)
    found: dict[str, str | None] = {}
    for name in plan.recipe.experts:
        if name not in given.stats:
            found[f"tokenizer of {name}"] = texts.tokenizer_hash(plan.models[name].directory)
        source = given.stats.get(name) or data[name]
        assert source is not None, "the recipe was checked for it"
        path = plan.recipe.folder / Path(source).expanduser()
        found[manifest.portable(source)] = sha256(path) if path.is_file() else None
    return found
