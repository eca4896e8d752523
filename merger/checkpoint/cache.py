"""The cache between runs: a folder that may be deleted at any time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Returns MERGER_CACHE, or merger's folder in the user's cache."""
    path = os.environ.get("MERGER_CACHE")
    if path:
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "merger"


def recall(kind: str, key: str) -> str | None:
    """Returns the last value of `remember`; None if there is none, or if it cannot be read."""
    try:
        return (cache_folder() / kind / key).read_text()
    except (OSError, ValueError):
        return None


def remember(kind: str, key: str, text: str) -> None:
    """Keeps a short text. Where that cannot be done nothing happens, for it only saves time."""
    folder = cache_folder() / kind
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.replace(file.name, folder / key)
            except OSError:
                os.unlink(file.name)
