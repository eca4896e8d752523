"""Opening whatever a recipe names: a folder or a Hub repository, safetensors or pickle, with or without an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from merger.checkpoint import hub
from merger.checkpoint.adapter import Adapted
from merger.checkpoint.adapter_config import CONFIG, other_base
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.folder import (
    ADAPTER,
    MODEL,
    Folder,
    find_weights,
    local_folder,
    read_json,
    read_tensors,
)
from merger.checkpoint.quantised import refuse_quantised_config, refuse_quantised_tensors
from merger.errors import CheckpointError


def open_checkpoint(
    model: str,
    adapter: str | None,
    *,
    label: str,
    folder: Path,
    offline: bool = False,
    headers_only: bool = False,
    base: Checkpoint | None = None,
) -> Checkpoint:
    """Opens the checkpoint ``model`` (with ``adapter`` on top), relative to ``folder`` if it is a path.

    ``headers_only`` is for a plan: of a Hub repository only configs and headers are fetched. ``base`` is
    what the checkpoint will be compared with: an adapter that sits on it differs from it by B·A exactly.
    """
    found = _find(model, label, folder, offline)
    if adapter is None:
        _refuse_adapter(found, model)
    config = read_json(found, "config.json")
    refuse_quantised_config(label, found.source, config)
    weights = find_weights(found, MODEL)
    if not headers_only:
        found = hub.download(found, weights.files)
    tensors = read_tensors(found, weights)
    refuse_quantised_tensors(label, tensors)
    opened = Checkpoint(label, found.directory, tensors, config, commit=found.commit)
    if adapter is None:
        return opened
    adapted = Adapted(opened, _open_adapter(adapter, label, folder, offline, headers_only), base)
    adapted.remarks = tuple(_remarks(adapted, model, adapter))
    return adapted


def _remarks(adapted: Adapted, model: str, adapter: str) -> Iterator[str]:
    """Says of an adapter that it was trained on another model."""
    names = (model, str(adapted.directory), str(adapted.config.get("_name_or_path")))
    if trained_on := other_base(adapted.adapter.config, names, adapted.commit):
        yield (
            f"{adapted.label}: the adapter {adapter} was trained on {trained_on}, but is added to {model}; "
            "make sure that the two have the same weights"
        )


def _open_adapter(adapter: str, label: str, folder: Path, offline: bool, headers_only: bool) -> Checkpoint:
    """An adapter's own tensors and config, by the names that peft gave them."""
    found = _find(adapter, label, folder, offline)
    config = read_json(found, CONFIG)
    weights = find_weights(found, ADAPTER)
    if not headers_only:
        found = hub.download(found, weights.files)
    named = f"{label}: the adapter {found.source}"
    tensors = read_tensors(found, weights)
    refuse_quantised_tensors(named, tensors)
    return Checkpoint(named, found.directory, tensors, config, commit=found.commit)


def _find(source: str, label: str, folder: Path, offline: bool) -> Folder:
    """A folder wins over a repository; what looks like a path never goes to the Hub."""
    path = folder / os.path.expanduser(source)
    if path.is_dir():
        return local_folder(path.resolve(), label)
    if path.is_file():
        raise CheckpointError(f"{label}: {path} is a file; give the folder that it lies in")
    if not hub.is_repository(source):
        raise CheckpointError(f"{label}: there is no folder {path}")
    return hub.open_repository(source, label=label, offline=offline)


def _refuse_adapter(found: Folder, model: str) -> None:
    """CheckpointError if what is given as a model is an adapter, or a model with an adapter beside it."""
    if CONFIG not in found.names:
        return
    if not any(name in found.names or f"{name}.index.json" in found.names for name in MODEL):
        on = read_json(found, CONFIG).get("base_model_name_or_path") or "the model it was trained on"
        raise CheckpointError(
            f"{found.label}: {model} is a PEFT adapter, not a model; write {{model: {on}, adapter: {model}}}"
        )
    if any(name in found.names for name in ADAPTER):
        raise CheckpointError(
            f"{found.label}: {model} holds a model and beside it a PEFT adapter, which transformers loads on top; "
            f"write {{model: {model}, adapter: {model}}} to merge the two, or move {CONFIG} elsewhere to leave it out"
        )
