"""The SHA-256 of weight files and configs, the inputs of a merge."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.checkpoint.cache import recall, remember
from merger.checkpoint.disk import CHUNK
from merger.errors import CheckpointError, UnreadableError, system_reason

if TYPE_CHECKING:
    from merger.checkpoint.checkpoint import Checkpoint

SETTLED = 2.0
"""Seconds since its last change after which a file is sure to have another time stamp when it changes again."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content.

    The file is not read if the Hub's cache names its hash, nor if it was hashed before and its path, size, inode and
    times have not changed since, which is how version control detects an unchanged file.
    """
    try:
        if (recorded_hash := recorded_sha256(path)) is not None:
            return recorded_hash
        stored = path.resolve()
        identity = _identity(stored)
        file_hash = digest(stored)
        if _identity(stored) == identity and time.time() - stored.stat().st_ctime > SETTLED:
            remember("sha256", identity, file_hash)
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {system_reason(error)}") from None
    return file_hash


def recorded_sha256(path: Path) -> str | None:
    """The SHA-256 of a file as far as it is known without reading it; raises OSError for a file that is not there."""
    stored = path.resolve()
    if stored.parent.name == "blobs" and _DIGEST.fullmatch(stored.name):
        return stored.name
    recorded_hash = recall("sha256", _identity(stored))
    return recorded_hash if recorded_hash is not None and _DIGEST.fullmatch(recorded_hash) else None


RUN_ALIKE = frozenset({"_name_or_path", "transformers_version", "use_cache"})
"""Keys of config.json that no forward pass depends on: where the model came from, what wrote it, and a cache that
calibration turns off. Every other key may decide one; an unknown key does until it is known better."""


def config_digest(model: Checkpoint) -> str:
    """Returns the SHA-256 of what decides the forward pass: config.json in any layout, and model code beside it."""
    text = json.dumps(_drop_keys(model.config, RUN_ALIKE), sort_keys=True)
    code = sorted(model.directory.glob("*.py")) if "auto_map" in model.config else ()
    parts = [text, *(f"{path.name} {sha256(path)}" for path in code)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _drop_keys(value: Any, keys: Set[str]) -> Any:
    """Returns a JSON value without ``keys`` in its objects, at any depth."""
    if isinstance(value, Mapping):
        return {key: _drop_keys(child, keys) for key, child in value.items() if key not in keys}
    return [_drop_keys(child, keys) for child in value] if isinstance(value, list) else value


def digest(path: Path, tell: Callable[[int], None] = lambda count: None) -> str:
    """Reads a file and returns its SHA-256; ``tell`` receives the number of bytes of each step."""
    file_hash = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            file_hash.update(chunk)
            tell(len(chunk))
    return file_hash.hexdigest()


def note(path: Path, sha256: str) -> None:
    """Remembers the SHA-256 of a file of ours by its place, size and time of change, for `noted`."""
    remember("by-mtime", _stamped(path), sha256)


def noted(path: Path) -> str | None:
    """The SHA-256 that a file had when it had this size and time of change; it may have been changed and set back."""
    return recall("by-mtime", _stamped(path))


def _stamped(path: Path) -> str:
    return hashlib.sha256(stamp(path).encode()).hexdigest()


def stamp(path: Path) -> str:
    """Returns a mark that changes with the file, without reading it, and that survives a restart of the machine."""
    stored = path.resolve()
    if stored.parent.name == "blobs" and _DIGEST.fullmatch(stored.name):
        return stored.name
    try:
        status = stored.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {system_reason(error)}") from None
    return f"{stored} {status.st_size} {status.st_mtime_ns}"


def _identity(path: Path) -> str:
    status = os.stat(path)
    fields = [str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()
