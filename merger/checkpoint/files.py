"""Single files: written beside a checkpoint in the making, or replaced in one step where merger wrote the old one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merger._version import MARK
from merger.checkpoint.disk import disk_error, sync
from merger.errors import RecipeError, system_reason

_SEARCHED = 64 << 10  # bytes at the beginning and at the end of a file in which its mark stands


def json_bytes(value: Any) -> bytes:
    """A value as JSON that people can read, the same bytes for the same value."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """A JSON file of a folder in the making."""
    write_bytes(path, json_bytes(value))


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8 of a folder in the making."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """A file of a folder in the making; ResourceError if the disk fails."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise disk_error(path, error, len(content)) from None


def make_folder(path: Path) -> None:
    """Makes a folder, with those that it lies in, if it is not there; ResourceError if the disk fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from None


def is_marked(path: Path) -> bool:
    """Whether a file says that merger wrote it."""
    with path.open("rb") as file:
        beginning = file.read(_SEARCHED)
        file.seek(max(0, path.stat().st_size - _SEARCHED))
        return MARK.encode() in beginning or MARK.encode() in file.read()


def check_replaceable(path: Path, name: str = "", is_ours: Callable[[Path], bool] = is_marked) -> None:
    """RecipeError unless a file can be written at ``path``, replacing at most an empty file or one that merger wrote.

    ``name`` is what messages call the file, if not by its path; ``is_ours`` tells whether merger wrote it.
    """
    name = name or str(path)
    try:
        if path.is_dir() or not path.parent.is_dir():
            raise RecipeError(f"{name}: expected a file in a folder that is there")
        if path.is_file() and path.stat().st_size and not is_ours(path):
            raise RecipeError(f"{name}: is there already, and merger did not write it; move it, or choose another name")
    except OSError as error:
        raise RecipeError(f"{name}: cannot be used: {system_reason(error)}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a new file's name beside ``path``, which takes its place when the block ends, complete and on disk.

    Symbolic links are followed; a pipe or a device is given as it is. If anything fails, ``path`` is as it was.
    Raises ResourceError if the disk fails.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    try:
        target = path.resolve()
        new = target.with_name(f".{secrets.token_hex(4)}.partial{target.suffix}")
        try:
            yield new
            if target.exists():
                shutil.copymode(target, new)
            sync(new)
            os.replace(new, target)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(path, error) from None


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one step, over one that may be replaced; ResourceError if the disk fails."""
    with replacing(path) as new:
        new.write_bytes(content)
