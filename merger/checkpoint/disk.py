"""Disk operations on every platform: sync, allocate, and one sentence for each kind of failure."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merger.errors import ResourceError, system_reason

CHUNK = 8 << 20
"""Bytes that are read or hashed together, a multiple of every number's width."""
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""Errors of a file system that lacks a call, such as fsync of a folder on CIFS."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def disk_error(path: Path, error: OSError, size: int = 0) -> ResourceError:
    """The error of a path that cannot be written; ``size`` is the number of bytes it needs, if that is known."""
    if error.errno in _FULL:
        needed = f" ({size:,} bytes are needed for it)" if size else ""
        return ResourceError(f"{path}: the disk is full{needed}; free some space, or write elsewhere")
    return ResourceError(f"{path}: cannot be written: {system_reason(error)}")


def allocate(descriptor: int, size: int) -> None:
    """Gives an empty file its full size, so that a full disk is found before the work.

    Where the platform or the file system cannot reserve space, the file has only its length.
    """
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with _where_supported():
            os.posix_fallocate(descriptor, 0, size)
            return
    os.ftruncate(descriptor, size)


def read_at(descriptor: int, buffer: memoryview, position: int) -> int:
    """Reads bytes of a file from a position on into a buffer; returns how many, 0 at the end of the file."""
    if hasattr(os, "preadv"):  # older macOS has none
        return os.preadv(descriptor, [buffer], position)
    content = os.pread(descriptor, len(buffer), position)
    buffer[: len(content)] = content
    return len(content)


def sync_data(descriptor: int) -> None:
    """Puts the bytes of an open file on disk, without its times."""
    with _where_supported():
        getattr(os, "fdatasync", os.fsync)(descriptor)  # macOS has no fdatasync


def sync_open(descriptor: int) -> None:
    """Puts an open file or folder on disk."""
    with _where_supported():
        os.fsync(descriptor)


def sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on disk; ResourceError if the disk fails."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            sync_open(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not isinstance(error, PermissionError) or not path.is_dir():  # one may write into a folder and not list it
            raise disk_error(path, error) from None


@contextmanager
def _where_supported() -> Iterator[None]:
    """Ignores that a file system lacks the call: there is nothing then that could be done."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
