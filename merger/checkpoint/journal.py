"""The journal of an output in the making: which run owns PATH.partial, and which of its shards are complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from merger.checkpoint.disk import sync_open
from merger.checkpoint.locks import Lock
from merger.errors import RecipeError, ResourceError, system_reason

NAME = "journal"
OWNER = "owner"
MODEL = "model"
REPLACED = "replaced"
_BEGINNING = b'{"plan": '


@dataclass(frozen=True)
class Finished:
    """A shard that is complete and on disk."""

    shard: str
    sha256: str
    notes: list[str]  # remarks on its tensors


class Journal:
    """A folder that one run at a time works in, and the file in it that says which shards are finished.

    The run that writes the file holds a lock on it. Its first line names the plan, each other line one shard.
    A line counts once it is complete, and is written once its shard is on disk, so that a kill at any moment
    leaves a true journal. The folder holds nothing but the journal, the output, and an old output that it replaces;
    a folder that holds anything else is somebody's, and is refused.
    """

    def __init__(self, folder: Path, plan: Mapping[str, str]) -> None:
        self.folder = folder
        self.plan = dict(plan)  # a hash of each part that decides the bytes of the shards
        self.finished: dict[str, Finished] = {}
        self._file: int | None = None
        self._lock: Lock | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this run has the folder to itself."""
        return self._file is not None

    def open(self, *, force: bool) -> None:
        """Makes the folder, locks it, and reads which shards an earlier run of the same plan has finished.

        Finished shards of another plan are refused, and with ``force`` forgotten.
        """
        path = self.folder / NAME
        self._refuse_strangers()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise ResourceError(f"{error.filename or path}: cannot be made: {system_reason(error)}") from None
        try:
            self._claim(file)
            self.finished = self._resumed(file, force=force)
        except OSError as error:
            self._give_up(file)
            raise ResourceError(f"{path}: cannot be used: {system_reason(error)}") from None
        except BaseException:
            self._give_up(file)
            raise
        self._file = file

    def _refuse_strangers(self) -> None:
        """RecipeError if the folder's name is taken by anything that no run wrote."""
        try:
            if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
                raise RecipeError(f"{self.folder}: is there already, and no run of merger left it; move it away")
            names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
            begun = _is_journal(self.folder / NAME) if NAME in names else names <= {OWNER}
        except OSError as error:
            raise ResourceError(f"{self.folder}: cannot be read: {system_reason(error)}") from None
        strangers = sorted(names - {NAME, OWNER, MODEL, REPLACED})
        if not begun or strangers:
            stranger = f" (it holds {strangers[0]})" if strangers else ""
            raise RecipeError(f"{self.folder}: is there already, and no run of merger left it; move it away{stranger}")

    def _claim(self, file: int) -> None:
        """Locks the journal, if the file is still in its place: a run at its end removes it."""
        path = self.folder / NAME
        self._lock = Lock(file, self.folder, self.folder / OWNER)
        try:
            in_place = os.path.samestat(os.fstat(file), os.stat(path))
        except FileNotFoundError:
            in_place = False
        if not in_place:
            raise RecipeError(f"{self.folder}: another run came to its end in this moment; start again")

    def _give_up(self, file: int) -> None:
        if self._lock is not None:
            self._lock.release()
        os.close(file)

    def _resumed(self, file: int, *, force: bool) -> dict[str, Finished]:
        """The shards that are finished already; the file is brought to name just these."""
        text = os.pread(file, os.fstat(file).st_size, 0)
        complete = text[: text.rfind(b"\n") + 1]
        plan, finished = _parsed(complete)
        if finished and plan != self.plan:
            if not force:
                raise RecipeError(_of_another_plan(self.folder, finished, plan, self.plan))
            finished = {}
        os.ftruncate(file, len(complete) if finished else 0)
        if not finished:
            _append(file, {"plan": self.plan})
        return finished

    def add(self, finished: Finished) -> None:
        """Records that a shard is complete and on disk."""
        assert self._file is not None, "it was never opened"
        try:
            _append(self._file, asdict(finished))
        except OSError as error:
            raise ResourceError(f"{self.folder / NAME}: cannot be written: {system_reason(error)}") from None
        self.finished[finished.shard] = finished

    def clear(self, *keep: str) -> None:
        """Removes the files of earlier runs from the folder, except the journal and the name ``keep``."""
        for name in {MODEL, REPLACED}.difference(keep):
            remove(self.folder / name)

    def remove(self) -> None:
        """Removes the folder, the journal last, for without it nobody would know whose the rest is."""
        with contextlib.suppress(OSError):
            self.clear()
            (self.folder / NAME).unlink()
            if self._lock is not None:
                self._lock.release()
            self.folder.rmdir()

    def close(self) -> None:
        """Gives the lock back."""
        if self._file is not None:
            if self._lock is not None:
                self._lock.release()
            os.close(self._file)
        self._file = None


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there; of a symbolic link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _append(file: int, line: Mapping[str, object]) -> None:
    os.write(file, json.dumps(line).encode() + b"\n")
    sync_open(file)


def _is_journal(path: Path) -> bool:
    """Whether a file begins as a journal does, or would if it were not cut short."""
    if path.is_symlink():
        return False
    with path.open("rb") as file:
        beginning = file.read(len(_BEGINNING))
    return beginning == _BEGINNING[: len(beginning)]


def _parsed(text: bytes) -> tuple[Mapping[str, str], dict[str, Finished]]:
    """The plan and its finished shards; nothing where the text is damaged."""
    try:
        first, *shards = [json.loads(line) for line in text.splitlines()]
        return dict(first["plan"]), {shard["shard"]: Finished(**shard) for shard in shards}
    except (ValueError, TypeError, KeyError):
        return {}, {}


def _of_another_plan(
    folder: Path, finished: Mapping[str, Finished], old_plan: Mapping[str, str], plan: Mapping[str, str]
) -> str:
    parts = " and other ".join(key for key in {**old_plan, **plan} if old_plan.get(key) != plan.get(key))
    shards = f"{len(finished)} finished {'shard' if len(finished) == 1 else 'shards'}"
    return (
        f"{folder}: holds {shards} of another merge (with other {parts}); run that one to its end, "
        "or start over with force=True"
    )
