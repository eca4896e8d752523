"""Locks: one process at a time works on a file, also where the file system knows no locks."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from merger.checkpoint.disk import UNSUPPORTED
from merger.errors import RecipeError


class Lock:
    """The lock on an open file, until `release` or the end of the process.

    Where the file system has no locks (Lustre, some network drives), the file ``owner`` stands for one. Nothing
    removes it when the process is killed, and a process of another machine cannot be asked whether it still runs,
    so whoever finds it is told to look.
    """

    def __init__(self, descriptor: int, path: Path, owner: Path) -> None:
        """Locks the file ``descriptor``, which messages call ``path``; RecipeError if another process has it."""
        self._owner: Path | None = None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"{path}: another run is writing it; wait for it or stop it") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED and error.errno != errno.ENOLCK:
                raise
            _claim(path, owner)
            self._owner = owner

    def release(self) -> None:
        """Removes the lock file; a lock of the system ends when the file is closed."""
        if self._owner is not None:
            self._owner.unlink(missing_ok=True)
        self._owner = None


def _claim(path: Path, owner: Path) -> None:
    """Creates the file ``owner``, which names the process that works on ``path``; raises RecipeError if it exists."""
    try:
        file = os.open(owner, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        holder = owner.read_text(errors="replace").strip() or "another process"
        raise RecipeError(
            f"{path}: {holder} is writing it, or was killed (this file system has no locks that would tell); "
            f"if it does not run any more, remove {owner} and start again"
        ) from None
    try:
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    finally:
        os.close(file)
