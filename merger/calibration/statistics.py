"""The statistics that a merge's saliency needs: read from files, found from an earlier run, or made by calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.calibration import Settings, batches, collect
from merger.calibration import samples as texts
from merger.calibration import statistics_files as files
from merger.calibration.input_fit import check_inputs, checked_blocks
from merger.calibration.moments import Moments
from merger.checkpoint.cache import cache_folder
from merger.checkpoint.hashes import sha256
from merger.options import RunOptions
from merger.pipeline.flow import Inputs
from merger.planning.plan import Part, Plan, TensorPlan
from merger.recipe.recipe import portable_location

if TYPE_CHECKING:
    from torch import Tensor

    from merger.checkpoint.checkpoint import Checkpoint

Merged = Callable[[str], "Tensor | None"]
"""Gives a merged tensor by its name in the output, or None as long as it is not made."""
Statistics = Mapping[str, Moments]
"""What enters each matrix of one expert, by the expert's own tensor names."""


def calibrate(plan: Plan, options: RunOptions, hidden_memory: int | None) -> dict[str, Path]:
    """Each expert's statistics file: the one the recipe names, one from an earlier run, or a new one.

    Forward passes run on ``options.device``, which is a definite device. Hidden states above ``hidden_memory`` bytes
    wait in files. All experts' data and tokenizers are looked at before the first forward pass. Raises
    CheckpointError for data or statistics that cannot be used, or an activation that is not finite.
    """
    given = plan.recipe.calibration
    assert given is not None, "the recipe was checked for it"
    found = {name: plan.recipe.folder / Path(path).expanduser() for name, path in given.stats.items()}
    for name, path in found.items():
        files.load(path, layers=layers(plan, name), checkpoint=fingerprint(plan.models[name]))
    wanted = {name: _samples(plan, name, options) for name in plan.recipe.experts if name not in found}
    folder = cache_folder()
    for name, (key, samples) in wanted.items():
        found[name] = folder / key.file_name()
        if files.find(folder, key) is None:
            options.notice(
                f"calibrating {name}: {len(samples.tokens)} samples, {sum(map(len, samples.tokens)):,} tokens"
            )
            files.save(found[name], _run(plan, name, key, samples, options, hidden_memory), key)
    return {name: found[name] for name in plan.recipe.experts}


def _samples(plan: Plan, name: str, options: RunOptions) -> tuple[files.Key, texts.Samples]:
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


def _run(plan: Plan, name: str, key: files.Key, samples: texts.Samples, *how: Any) -> dict[str, Moments]:
    moments = {own: each for _, block in _blocks(plan, name, key, samples, *how) for own, each in block.items()}
    # a layer that the text never reached is on record as such, so that a file that lacks one is known to be damaged
    unreached = Moments(count=torch.zeros((), dtype=torch.int64))
    return {**dict.fromkeys(layers(plan, name), unreached), **moments}


def _blocks(
    plan: Plan,
    name: str,
    key: files.Key,
    samples: texts.Samples,
    options: RunOptions,
    hidden_memory: int | None,
    *,
    gram: bool = False,
    onward: Onward | None = None,
    known: Container[str] = (),
) -> Iterator[tuple[str, dict[str, Moments]]]:
    """What enters an expert's matrices, block by block; CheckpointError where it does not fit them."""
    found = collect(
        plan.models[name],
        batches(samples.tokens),
        key.settings,
        device=options.device,
        host_memory=hidden_memory,
        trust_remote_code=options.trust_remote_code,
        gram=gram,
        onward=onward,
        known=known,
        notice=options.notice,
        progress=partial(options.progress, f"calibrating {name}"),
    )
    return checked_blocks(plan, name, found)


class Onward:
    """The merged model as far as it is made, by an expert's names: what is not merged yet is the expert's own."""

    def __init__(self, plan: Plan, expert: str, merged: Merged) -> None:
        self._own, self._merged = plan.models[expert], merged
        self._names = {own: tensor.name for tensor in plan.tensors if (own := tensor.reads.get(expert)) is not None}

    def read(self, name: str) -> Tensor:
        """A whole tensor in the expert's own shape: rows of its vocabulary that were dropped stay its own."""
        merged = self._merged(self._names.get(name, name))
        if merged is None or merged.shape == self._own.tensors[name].shape:
            return self._own.read(name) if merged is None else merged
        own = self._own.read(name).to(merged.dtype)
        common = min(len(own), len(merged))
        own[:common] = merged[:common]
        return own


def grams(
    plan: Plan, options: RunOptions, hidden_memory: int | None, merged: Merged
) -> Iterator[tuple[list[TensorPlan], Mapping[str, Statistics]]]:
    """The tensors that take Gram matrices, as those become known: all experts advance together, block by block.

    What a block's tensors were given is dropped when the next is asked for. Where stages ask for inputs behind the
    merged blocks, ``merged`` gives their tensors by then. Tensors whose inputs were never seen come last, with
    nothing. Raises as `calibrate` does.
    """
    waiting = [tensor for tensor in plan.tensors if tensor.gram]
    experts = tuple(plan.recipe.experts) if waiting else ()
    fed = any(tensor.fed_by_merged for tensor in waiting)
    onward = {name: Onward(plan, name, merged) if fed else None for name in plan.recipe.experts}
    kept = _kept_grams(plan, options) if waiting and not fed else {}
    memory = hidden_memory and hidden_memory // len(plan.recipe.experts)
    wanted = {name: _samples(plan, name, options) for name in experts if name not in kept}
    streams = [
        checked_blocks(plan, name, files.blocks(kept[name], checkpoint=fingerprint(plan.models[name])))
        if name in kept
        else _blocks(plan, name, *wanted[name], options, memory, gram=True, onward=onward[name])
        for name in experts
    ]
    known: dict[str, dict[str, Moments]] = {name: {} for name in experts}
    for several in zip_longest(*streams, fillvalue=("", {})):
        for have, (_, moments) in zip(known.values(), several, strict=True):
            have.update(moments)
        ready = [t for t in waiting if all(t.reads[name] in have for name, have in known.items())]
        yield ready, known
        for tensor in ready:
            waiting.remove(tensor)
            for name, have in known.items():
                have.pop(tensor.reads[name] or "", None)
    yield waiting, {name: {} for name in known}


def _kept_grams(plan: Plan, options: RunOptions) -> dict[str, Path]:
    """The folders of Gram matrices that the recipe names, or that `keep_grams` has made of the same text."""
    given = plan.recipe.calibration
    assert given is not None, "the recipe was checked for it"
    found = {}
    for name in plan.recipe.experts:
        if name in given.stats:
            found[name] = plan.recipe.folder / Path(given.stats[name]).expanduser()
        else:
            key, _ = _samples(plan, name, options)
            folder = cache_folder() / key.folder_name()
            if files.is_whole(folder):
                found[name] = folder
    return found


def keep_grams(plan: Plan, options: RunOptions, hidden_memory: int | None, to: Path | None) -> dict[str, Path]:
    """Each expert's folder of statistics with Gram matrices, in ``to`` or in the cache; goes on with unfinished ones.

    They are as large as the models. Raises as `calibrate` does.
    """
    folders = {}
    for name in plan.recipe.experts:
        key, samples = _samples(plan, name, options)
        folder = to / f"{name}{files.GRAMS}" if to else cache_folder() / key.folder_name()
        folders[name] = folder
        done = files.kept_units(folder, key)
        if files.is_whole(folder):
            continue
        options.notice(f"calibrating {name}: {len(samples.tokens)} samples; {len(done)} blocks are there already")
        found = _blocks(plan, name, key, samples, options, hidden_memory, gram=True, known=done)
        for number, (unit, moments) in enumerate(found, len(done)):
            files.save_block(folder, number, unit, moments, key)
    return folders


def layers(plan: Plan, expert: str) -> list[str]:
    """The expert's tensors whose inputs some stage looks at."""
    wanted = (t for t in plan.tensors if t.calibrated and not t.gram)
    read = (t.reads[expert] for t in wanted if t.has_inputs)
    return sorted({name for name in read if name is not None})


def fingerprint(model: Checkpoint) -> str:
    """The SHA-256 of the names and SHA-256s of a checkpoint's weight files."""
    lines = sorted(f"{file.name} {sha256(file)}\n" for file in model.files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load(plan: Plan, paths: Mapping[str, Path]) -> dict[str, Statistics]:
    """Reads the experts' statistics files; CheckpointError where they do not fit the plan's tensors."""
    statistics: dict[str, Statistics] = {name: files.load(path) for name, path in paths.items()}
    for name, moments in statistics.items():
        check_inputs(plan, name, moments)
    return statistics


# --- from statistics to a stage's inputs ----------------------------------------------------------


def inputs_of(
    tensor: TensorPlan, part: Part, statistics: Mapping[str, Statistics], notice: Callable[[str], None]
) -> Inputs:
    """What the stages of one part of a tensor may know of its inputs: [k c], or nothing where an expert has none."""
    if not tensor.calibrated or not (tensor.has_inputs or tensor.kind == "embedding"):
        return Inputs()
    each_expert = [statistics[name].get(tensor.reads[name] or "") for name in tensor.place.experts]
    if tensor.has_inputs and any(each is None or each.second_moment is None for each in each_expert):
        _tell_unseen(tensor, notice)
        return Inputs()
    if any(each is None for each in each_expert):
        return Inputs()
    known = [_of_part(each, tensor, part) for each in each_expert if each is not None]
    moments = [each.second_moment for each in known if each.second_moment is not None]
    means = [each.mean for each in known if each.mean is not None]
    shares = [each.token_share for each in known if each.token_share is not None]
    if len(moments) == len(means) == len(known):
        several = [each.gram for each in known if each.gram is not None]
        gram = torch.stack(several) if len(several) == len(known) else None
        _tell_unreached(moments, tensor, part, notice)
        return Inputs(torch.stack(moments), torch.stack(means), gram)
    if len(shares) == len(known):
        return Inputs(token_share=torch.stack([share[: part.rows] for share in shares]))
    return Inputs()


def _of_part(moments: Moments, tensor: TensorPlan, part: Part) -> Moments:
    """The moments of the matrix of one packed expert, or of the whole tensor where it is a single matrix."""
    if tensor.kind != "expert3d" or moments.second_moment is None or moments.mean is None:
        return moments
    e = tensor.parts.index(part)
    gram = None if moments.gram is None else moments.gram[e]
    return Moments(moments.count[e], moments.second_moment[e], moments.mean[e], gram)


def _tell_unseen(tensor: TensorPlan, notice: Callable[[str], None]) -> None:
    """Tells of layers, once for a list of blocks, that calibration saw in no forward pass, such as an image tower's."""
    where = tensor.name if tensor.unit == tensor.name else f"some layers of {tensor.unit.rpartition('.')[0]}"
    notice(f"{where}: calibration saw no input; their changes are judged without it")


def _tell_unreached(moments: Sequence[Tensor], tensor: TensorPlan, part: Part, notice: Callable[[str], None]) -> None:
    """Tells of experts whose text sent no token here; a stage is told by `reached` (methods.md 2.1)."""
    silent = [name for name, each in zip(tensor.place.experts, moments, strict=True) if not each.any()]
    if silent:
        notice(f"{part.name}: no input ever reached it in {', '.join(silent)}; its changes are judged without it")


def origin(paths: Mapping[str, Path]) -> dict[str, Any]:
    """The SHA-256 of each statistics file, for the manifest."""
    return {name: files.digest(path) for name, path in paths.items()}


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
        found[portable_location(source)] = files.digest(path) if path.exists() else None
    return found
