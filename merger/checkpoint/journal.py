"""The journal of an output that is being made: whose work PATH.partial is, and which of its shards are whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from merger.errors import RecipeError, ResourceError

NAME = "journal"


@dataclass(frozen=True)
class Finished:
    """A shard that is whole and on disk."""

    shard: str
    sha256: str
    notes: list[str]  # what was noted while its tensors were made


class Journal:
    """A folder that one run at a time works in, and the file in it that says what is finished.

    The run that writes the file holds a lock on it. Its first line tells the plan, each other line one shard.
    A line counts once it is whole, and is written once its shard is on disk, so that a kill at any moment
    leaves a true journal.
    """

    def __init__(self, folder: Path, plan: Mapping[str, str]) -> None:
        self.folder = folder
        self.plan = dict(plan)  # what decides the bytes of the shards: a hash of each part
        self.finished: dict[str, Finished] = {}
        self._file: int | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this run has the folder to itself."""
        return self._file is not None

    def open(self, *, force: bool) -> None:
        """Makes the folder, locks it, and reads what an earlier run of the same plan has finished.

        Finished shards of another plan are refused, and with ``force`` forgotten.
        """
        file = self._claim()
        try:
            self.finished = self._resumed(file, force=force)
        except OSError as error:
            os.close(file)
            raise ResourceError(f"{self.folder / NAME}: cannot be used: {error.strerror}") from None
        except BaseException:
            os.close(file)
            raise
        self._file = file

    def _claim(self) -> int:
        path = self.folder / NAME
        try:
            foreign = self.folder.is_dir() and not path.exists() and any(self.folder.iterdir())
            if foreign or self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
                raise RecipeError(f"{self.folder}: is there already, and no run of merger left it; move it away")
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise ResourceError(f"{error.filename or path}: cannot be made: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file), os.stat(path)):
                raise FileNotFoundError  # the run that had it came to its end in this moment
        except (BlockingIOError, FileNotFoundError):
            os.close(file)
            raise RecipeError(f"{self.folder}: another run is writing it; wait for it or stop it") from None
        return file

    def _resumed(self, file: int, *, force: bool) -> dict[str, Finished]:
        """What is finished already; the file is brought to say just that."""
        text = os.pread(file, os.fstat(file).st_size, 0)
        whole = text[: text.rfind(b"\n") + 1]
        plan, finished = _parsed(whole)
        if finished and plan != self.plan:
            if not force:
                raise RecipeError(_of_another_plan(self.folder, finished, plan, self.plan))
            finished = {}
        os.ftruncate(file, len(whole) if finished else 0)
        if not finished:
            _append(file, {"plan": self.plan})
        return finished

    def add(self, finished: Finished) -> None:
        """Says that a shard is whole and on disk."""
        assert self._file is not None, "it was never opened"
        try:
            _append(self._file, asdict(finished))
        except OSError as error:
            raise ResourceError(f"{self.folder / NAME}: cannot be written: {error.strerror}") from None
        self.finished[finished.shard] = finished

    def clear(self, keep: Path) -> None:
        """Removes everything in the folder but the journal itself and ``keep``."""
        for each in self.folder.iterdir():
            if each not in (keep, self.folder / NAME):
                remove(each)

    def remove(self) -> None:
        """Removes the folder, the journal last, for without it nobody would know whose the rest is."""
        with contextlib.suppress(OSError):
            self.clear(self.folder / NAME)
            (self.folder / NAME).unlink()
            self.folder.rmdir()

    def close(self) -> None:
        """Gives the lock back."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


def remove(path: Path) -> None:
    """Removes a file or a folder; of a symbolic link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _append(file: int, line: Mapping[str, object]) -> None:
    os.write(file, json.dumps(line, ensure_ascii=False).encode() + b"\n")
    os.fsync(file)


def _parsed(text: bytes) -> tuple[Mapping[str, str], dict[str, Finished]]:
    """The plan and what is finished of it; nothing where the text is no journal."""
    try:
        first, *others = [json.loads(line) for line in text.splitlines()]
        return dict(first["plan"]), {each["shard"]: Finished(**each) for each in others}
    except (ValueError, TypeError, KeyError):
        return {}, {}


def _of_another_plan(
    folder: Path, finished: Mapping[str, Finished], one: Mapping[str, str], other: Mapping[str, str]
) -> str:
    parts = " and other ".join(key for key in {**one, **other} if one.get(key) != other.get(key))
    shards = f"{len(finished)} finished {'shard' if len(finished) == 1 else 'shards'}"
    return (
        f"{folder}: holds {shards} of another merge (with other {parts}); run that one to its end, "
        "or start over with --force"
    )
