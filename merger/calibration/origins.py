"""The origins of statistics and Gram matrices: SHA-256s of weights, configs, texts and tokenizers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.calibration import statistics_files as files
from merger.checkpoint.hashes import config_digest, sha256
from merger.checkpoint.tokenizers import Tokenizer, tokenizer_folder
from merger.planning.plan import Plan
from merger.recipe.recipe import Recipe, portable_location

if TYPE_CHECKING:
    from merger.checkpoint.checkpoint import Checkpoint


def fingerprint(model: Checkpoint) -> str:
    """The SHA-256 of a checkpoint's weight files with their names, and of the config keys of the forward pass."""
    lines = [*sorted(f"{file.name} {sha256(file)}\n" for file in model.files), f"config {config_digest(model)}\n"]
    if model.is_rearranged:  # statistics have the names by which tensors are read
        lines += [f"tensor {name}\n" for name in sorted(model.tensors)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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


def sources(plan: Plan) -> dict[str, str | None]:
    """Returns the SHA-256 of calibration's files of text and statistics and its tokenizers; None for a Hub dataset."""
    calibration = plan.recipe.calibration
    if calibration is None or not plan.inputs:
        return {}
    calibrated_experts = [name for name in plan.recipe.experts if name not in calibration.stats]
    tokenizers = {f"tokenizer of {name}": tokenizer_digest(plan.models[name]) for name in calibrated_experts}
    return {**tokenizers, **calibration_files(plan.recipe)}


def origin(paths: Mapping[str, Path]) -> dict[str, Any]:
    """The SHA-256 of each statistics file, for the manifest."""
    return {name: files.digest(path) for name, path in paths.items()}
