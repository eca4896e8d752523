"""The SHA-256 of weight files and configs, which is what a merge was made from."""

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
from merger.errors import CheckpointError, UnreadableError, system_reason

if TYPE_CHECKING:
    from merger.checkpoint.checkpoint import Checkpoint

SETTLED = 2.0
"""Seconds since its last change after which a file is sure to have another time stamp when it changes again."""

CHUNK = 8 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content.

    It is not read where the Hub's cache names it, nor where it was hashed before and its place, size,
    inode and times are the same since, which is how version control tells an unchanged file.
    """
    stored = path.resolve()
    if stored.parent.name == "blobs" and _DIGEST.fullmatch(stored.name):
        return stored.name
    try:
        identity = _identity(stored)
        known = recall("sha256", identity)
        if known is not None and _DIGEST.fullmatch(known):
            return known
        found = digest(stored)
        if _identity(stored) == identity and time.time() - stored.stat().st_ctime > SETTLED:
            remember("sha256", identity, found)
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {system_reason(error)}") from None
    return found


RUN_ALIKE = frozenset({"_name_or_path", "transformers_version", "use_cache"})
"""Keys of config.json that no forward pass depends on: where the model came from, what wrote it, and a cache that
calibration turns off. Every other key may decide one; an unknown key does until it is known better."""


def config_digest(model: Checkpoint) -> str:
    """The SHA-256 of what config.json, however it is laid out, and model code beside it say of the forward pass."""
    text = json.dumps(_without(model.config, RUN_ALIKE), sort_keys=True)
    code = sorted(model.directory.glob("*.py")) if "auto_map" in model.config else ()
    parts = [text, *(f"{path.name} {sha256(path)}" for path in code)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _without(value: Any, keys: Set[str]) -> Any:
    """A JSON value without these keys of its objects, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without(each, keys) for key, each in value.items() if key not in keys}
    return [_without(each, keys) for each in value] if isinstance(value, list) else value


def digest(path: Path, tell: Callable[[int], None] = lambda count: None) -> str:
    """The SHA-256 of a file, which is read for it; ``tell`` hears how many bytes each step was."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
            tell(len(chunk))
    return found.hexdigest()


def note(path: Path, sha256: str) -> None:
    """Remembers the SHA-256 of a file of ours by its place, size and time of change, for `noted`."""
    remember("by-mtime", _stamped(path), sha256)


def noted(path: Path) -> str | None:
    """The SHA-256 that a file had when it had this size and time of change; it may have been changed and set back."""
    return recall("by-mtime", _stamped(path))


def _stamped(path: Path) -> str:
    return hashlib.sha256(stamp(path).encode()).hexdigest()


def stamp(path: Path) -> str:
    """What shows without a look inside whether a file is still the same, even after the machine was started anew."""
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
    told = [str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
