"""An output in the making: a folder beside its final place, which takes its name when it is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from merger.checkpoint.disk import sync
from merger.checkpoint.hashes import digest, note
from merger.checkpoint.journal import MODEL, REPLACED, Journal, remove
from merger.checkpoint.placement import partial_of, take_place
from merger.errors import ResourceError, system_reason


class Output:
    """A folder that is filled as ``PATH.partial/model`` and renamed to ``PATH`` when it is complete.

    `open` claims it and keeps the files that an earlier run of the same ``plan`` has finished. `finish`, `abandon` or
    `suspend` end it; the last two are right after an error anywhere, in `open` too.
    """

    def __init__(self, path: Path, plan: Mapping[str, str]) -> None:
        self.path = path
        self.journal = Journal(partial_of(path), plan)
        self.folder = self.journal.folder / MODEL
        self._missing = [folder for folder in (self.journal.folder, *path.parents) if not folder.exists()]

    def open(self, *, force: bool = False, tell: Callable[[int, int], None] = lambda count, total: None) -> None:
        """Creates the folder, or continues in the folder of an earlier run and keeps its complete files.

        ``tell`` receives the number of bytes of finished files that were hashed again, and their total. Raises
        RecipeError if another run or another plan has the folder, and ResourceError if the disk fails.
        """
        self.journal.open(force=force)
        self._check_finished(tell)
        try:
            self._restore_replaced()
            self.journal.clear(MODEL)
            if not self.folder.is_dir() or self.folder.is_symlink():
                self.folder.unlink(missing_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._clear()
        except OSError as error:
            raise ResourceError(f"{self.journal.folder}: cannot be cleared: {system_reason(error)}") from None

    def finish(self, *, force: bool) -> None:
        """Renames the folder into place and only then replaces an earlier output."""
        for path in sorted(self.folder.rglob("*")):
            sync(path)
        sync(self.folder)
        take_place(self.folder, self.path, self.journal.folder / REPLACED, force=force)
        finished = list(self.journal.finished.values())
        self.journal.finished.clear()  # a run that is stopped from here on leaves nothing unfinished
        for file in finished:
            note(self.path / file.shard, file.sha256)
        self.journal.remove()
        self.close()

    def abandon(self) -> None:
        """Removes the written files and the folders that were created for them."""
        self._remove()
        self.close()

    def suspend(self) -> bool:
        """Keeps the finished files for the next run of the same plan; returns whether there are any."""
        unfinished = self.journal.is_ours and bool(self.journal.finished)
        if unfinished:
            with contextlib.suppress(OSError):
                self._clear()
        else:
            self._remove()
        self.close()
        return unfinished

    def close(self) -> None:
        """Lets another run have the folder."""
        self.journal.close()

    def _check_finished(self, tell: Callable[[int, int], None]) -> None:
        """Forgets the files of the journal whose content has another hash by now."""
        finished = self.journal.finished
        total, hashed = sum(_size(self.folder / file) for file in finished), 0

        def count(size: int) -> None:
            nonlocal hashed
            hashed += size
            tell(hashed, total)

        for file in list(finished.values()):
            if not _has_hash(self.folder / file.shard, file.sha256, count):
                del finished[file.shard]

    def _restore_replaced(self) -> None:
        """Gives an old output its name back, if its run was killed before the new one had it."""
        old = self.journal.folder / REPLACED
        if os.path.lexists(old) and not os.path.lexists(self.path):
            os.rename(old, self.path)

    def _clear(self) -> None:
        """Removes all but the finished files."""
        for file in self.folder.iterdir():
            if file.name not in self.journal.finished:
                remove(file)

    def _remove(self) -> None:
        if self.journal.is_ours:
            self.journal.remove()
        with contextlib.suppress(OSError):
            for folder in self._missing:
                if folder.exists():
                    folder.rmdir()  # only while nobody has put anything there


def unfinished_bytes(path: Path) -> int:
    """Returns the bytes of disk in an unfinished run of this output, which the next run reuses or frees."""
    try:
        return sum(file.lstat().st_blocks * 512 for file in (partial_of(path) / MODEL).iterdir())
    except OSError:
        return 0


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _has_hash(file: Path, sha256: str, tell: Callable[[int], None]) -> bool:
    try:
        return not file.is_symlink() and digest(file, tell) == sha256
    except OSError:
        return False  # it is made again
