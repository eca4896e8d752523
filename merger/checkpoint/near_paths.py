"""The folder or file that was probably meant by a path that leads nowhere."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

_LIKENESS = 0.75  # at least; names of files are alike by their suffix alone: wiki.jsonl and code.jsonl by 0.6


def near_path(path: Path, is_suitable: Callable[[Path], bool], start: Path = Path()) -> Path | None:
    """An existing path each of whose parts is that of ``path``, or else the closest name there; None if there is none.

    Its parents are folders, and ``is_suitable`` holds for itself. Relative paths begin at the folder ``start``.
    """
    near = Path(path.anchor)
    parts = path.relative_to(path.anchor).parts
    for i, part in enumerate(parts):
        fits = is_suitable if i + 1 == len(parts) else Path.is_dir
        if part != ".." and not fits(start / near / part):
            close = difflib.get_close_matches(part, names_in(start / near, fits), n=1, cutoff=_LIKENESS)
            if not close:
                return None
            part = close[0]
        near /= part
    return near


def missing_path(path: Path, noun: str, is_suitable: Callable[[Path], bool]) -> str:
    """The message for a path that leads nowhere, with the near one that was probably meant."""
    near = near_path(path, is_suitable)
    return f"{path}: there is no such {noun}{f'; did you mean {near}?' if near else ''}"


def names_in(folder: Path, is_suitable: Callable[[Path], bool]) -> list[str]:
    """The names of a folder's entries for which ``is_suitable`` holds, in order; none if it cannot be read."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if is_suitable(entry))
    except OSError:
        return []
