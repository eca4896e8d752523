"""Opening whatever a recipe names: a folder or a Hub repository, safetensors or pickle, with or without an adapter."""

from __future__ import annotations

from pathlib import Path

from merger.checkpoint.stored import Checkpoint, read_config, refuse_quantised_tensors, safetensors_tensors
from merger.errors import CheckpointError


def open_checkpoint(
    model: str,
    adapter: str | None,
    *,
    label: str,
    folder: Path,
    offline: bool = False,
    headers_only: bool = False,
) -> Checkpoint:
    """Opens the checkpoint ``model`` (with ``adapter`` on top), relative to ``folder`` if it is a path.

    ``headers_only`` is for a plan: of a Hub repository only configs and headers are fetched.
    """
    directory = (folder / Path(model).expanduser()).resolve()
    if not directory.is_dir():
        raise CheckpointError(f"{label}: there is no folder {directory}")
    config = read_config(directory, label)
    tensors = safetensors_tensors(directory, label)
    refuse_quantised_tensors(tensors, label)
    return Checkpoint(label, directory, tensors, config)
