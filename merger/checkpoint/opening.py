"""Opening whatever a recipe names: a folder or a Hub repository, safetensors or pickle, with or without an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from merger.checkpoint import hub
from merger.checkpoint.adapter import Adapted
from merger.checkpoint.adapter_config import CONFIG, other_base
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.codes import decode
from merger.checkpoint.conversions import as_stored_by
from merger.checkpoint.folder import (
    ADAPTER,
    MODEL,
    Folder,
    find_weights,
    local_folder,
    read_json,
    read_tensors,
)
from merger.checkpoint.foreign_models import foreign_model
from merger.checkpoint.quantised import QUANTISATION_KEYS, refuse_quantised_config, refuse_quantised_tensors
from merger.checkpoint.renaming import new_names
from merger.checkpoint.tensor_info import Info
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
    rename: Mapping[str, str] = MappingProxyType({}),
) -> Checkpoint:
    """Opens the checkpoint ``model`` (with ``adapter`` on top), relative to ``folder`` if it is a path.

    With ``headers_only``, for a plan, only configs and headers of a Hub repository are fetched. ``base`` is the
    checkpoint of the comparison: tensors that it stores under other names are read by its names, and an adapter on it
    differs from it by B·A exactly. ``rename`` has other names for the model's tensors, as `new_names` applies them.
    """
    model_folder = _find(model, label, folder, offline)
    if (kind := foreign_model(model_folder.names, model_folder.directory)) is not None:
        raise CheckpointError(f"{label}: {model} {kind}")
    if adapter is None:
        _refuse_adapter(model_folder, model)
    config = read_json(model_folder, "config.json")
    weights = find_weights(model_folder, MODEL)
    if not headers_only:
        model_folder = hub.download(model_folder, weights.files)
    tensors = read_tensors(model_folder, weights)
    tensors, remarks = decode(label, tensors, config)
    if not remarks:
        refuse_quantised_config(label, model_folder.source, config)
    refuse_quantised_tensors(label, tensors)
    names = new_names(label, tensors, rename)
    renamed = {names[name]: info for name, info in tensors.items()}
    arranged = renamed if base is None else as_stored_by(base, renamed)
    checkpoint = Checkpoint(
        label,
        model_folder.directory,
        arranged,
        {key: value for key, value in config.items() if key not in QUANTISATION_KEYS},
        commit=model_folder.commit,
        original_names=_original_names(arranged, tensors),
    )
    checkpoint.remarks = remarks
    checkpoint.is_rearranged = arranged.keys() != tensors.keys()
    if adapter is None:
        return checkpoint
    adapted = Adapted(checkpoint, _open_adapter(adapter, label, folder, offline, headers_only), base)
    adapted.remarks = (*remarks, *_remarks(adapted, model, adapter))
    return adapted


def _original_names(tensors: Mapping[str, Info], stored: Mapping[str, Info]) -> dict[str, str]:
    """The names in the files of tensors that have other names, as far as these are stored as they are read."""
    if tensors.keys() == stored.keys():
        return {}
    names = {info: name for name, info in stored.items()}
    return {name: names[info] for name, info in tensors.items() if name not in stored and info in names}


def _remarks(adapted: Adapted, model: str, adapter: str) -> Iterator[str]:
    """Says of an adapter that it was trained on another model."""
    names = (model, str(adapted.directory), str(adapted.config.get("_name_or_path")))
    if trained_on := other_base(adapted.adapter.config, names, adapted.commit):
        yield (
            f"{adapted.label}: the adapter {adapter} was trained on {trained_on}, but is added to {model}; "
            "make sure that the two have the same weights"
        )


def _open_adapter(adapter: str, label: str, folder: Path, offline: bool, headers_only: bool) -> Checkpoint:
    """Opens an adapter's tensors and config, by peft's names."""
    adapter_folder = _find(adapter, label, folder, offline)
    config = read_json(adapter_folder, CONFIG)
    weights = find_weights(adapter_folder, ADAPTER)
    if not headers_only:
        adapter_folder = hub.download(adapter_folder, weights.files)
    adapter_label = f"{label}: the adapter {adapter_folder.source}"
    tensors = read_tensors(adapter_folder, weights)
    refuse_quantised_tensors(adapter_label, tensors)
    return Checkpoint(adapter_label, adapter_folder.directory, tensors, config, commit=adapter_folder.commit)


def _find(source: str, label: str, folder: Path, offline: bool) -> Folder:
    """Finds the folder of a model: a local folder before a repository; a path never goes to the Hub."""
    path = folder / os.path.expanduser(source)
    if path.is_dir():
        return local_folder(path.resolve(), label)
    if path.is_file():
        raise CheckpointError(f"{label}: {path} is a file; give the folder that it lies in")
    if not hub.is_repository(source):
        raise CheckpointError(f"{label}: there is no folder {path}")
    return hub.open_repository(source, label=label, offline=offline)


def is_adapter(folder: Folder) -> bool:
    """Whether a folder holds a PEFT adapter and no model."""
    return CONFIG in folder.names and not any(
        name in folder.names or f"{name}.index.json" in folder.names for name in MODEL
    )


def _refuse_adapter(model_folder: Folder, model: str) -> None:
    """Raises CheckpointError if the folder of a model holds an adapter, alone or beside the model."""
    if CONFIG not in model_folder.names:
        return
    if is_adapter(model_folder):
        on = read_json(model_folder, CONFIG).get("base_model_name_or_path") or "the model it was trained on"
        raise CheckpointError(
            f"{model_folder.label}: {model} is a PEFT adapter, not a model; write {{model: {on}, adapter: {model}}}"
        )
    if any(name in model_folder.names for name in ADAPTER):
        raise CheckpointError(
            f"{model_folder.label}: {model} holds a model and beside it a PEFT adapter, which transformers "
            f"loads on top; write {{model: {model}, adapter: {model}}} to merge the two, or move {CONFIG} elsewhere to "
            "leave it out"
        )
