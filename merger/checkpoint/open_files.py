"""Open files: as many as the process may have, where models have more shards than that."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

_ENOUGH = 4096  # descriptors that stay open where the process may have any number


@dataclass
class _Open:
    """One open file."""

    descriptor: int
    users: int = 0


# the open files of all instances, the least recently used first
_open_entries: OrderedDict[tuple[OpenFiles, Path], _Open] = OrderedDict()
_lock = Lock()


class OpenFiles:
    """The files of one checkpoint or output, opened when first used and again when need be; threads share them.

    All instances together keep half of the descriptors that the process may have: beyond that, the file that was
    used longest ago is closed. A file that is another one when it is opened again is an OSError.
    """

    def __init__(self, flags: int) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._identities: dict[Path, tuple[int, ...]] = {}

    @contextmanager
    def use(self, path: Path, flags: int = 0) -> Iterator[int]:
        """The descriptor of a file, which stays open meanwhile; ``flags`` are added if it must be opened for this."""
        with _lock:
            file = _open_entries.get((self, path)) or self._open(path, flags)
            _open_entries.move_to_end((self, path))
            file.users += 1
        try:
            yield file.descriptor
        finally:
            with _lock:
                file.users -= 1

    def close(self) -> None:
        """Closes the files of this instance."""
        with _lock:
            for owner, path in [key for key in _open_entries if key[0] is self]:
                os.close(_open_entries.pop((owner, path)).descriptor)

    def _open(self, path: Path, flags: int) -> _Open:
        limit = _limit()
        while len(_open_entries) >= limit and _close_one():
            pass
        descriptor = self._descriptor(path, flags)
        if self._identities.setdefault(path, _identity(descriptor)) != _identity(descriptor):
            os.close(descriptor)
            raise OSError(errno.ESTALE, "it was replaced meanwhile", str(path))
        file = _open_entries[self, path] = _Open(descriptor)
        return file

    def _descriptor(self, path: Path, flags: int) -> int:
        while True:
            try:
                return os.open(path, self._flags | flags, 0o644)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not _close_one():
                    raise


def _close_one() -> bool:
    """Closes the file that was used longest ago; False if all are in use."""
    key = next((key for key, file in _open_entries.items() if not file.users), None)
    if key is not None:
        os.close(_open_entries.pop(key).descriptor)
    return key is not None


def _limit() -> int:
    """How many files stay open: the other half of the descriptors is for everything else that a process opens."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _ENOUGH if soft == resource.RLIM_INFINITY else max(1, soft // 2)


def _identity(descriptor: int) -> tuple[int, int]:
    """Returns a mark that is equal while a path names the same file."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
