"""Writing a checkpoint: shards filled in any order, hashed as they fill, whole or absent."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.hashes import digest, note
from merger.checkpoint.journal import Finished, Journal, remove
from merger.checkpoint.layout import Shard, index, index_name
from merger.checkpoint.safetensors_header import Info
from merger.errors import RecipeError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 8 << 20
DIRTY = 256 << 20
"""Bytes of a shard after which the disk is made to write: at the end there is little left to wait for."""


def check_output(path: Path, inputs: Iterable[Path], *, beside: Iterable[Path] = (), force: bool) -> None:
    """Refuses an output that is occupied, or that would touch an input; symbolic links are followed first.

    Nothing may be written to an ``inputs`` folder or take its place; ``beside`` are files and folders
    that an output may lie in or next to, but not replace.
    """
    try:
        real = path.resolve()
        for each in inputs:
            directory = each.resolve()
            if real == directory or directory in real.parents or real in directory.parents:
                raise RecipeError(f"output.path: {path} is, holds or lies in the input {each}; choose another folder")
        for each in beside:
            if real in (each.resolve(), *each.resolve().parents):
                raise RecipeError(f"output.path: {path} is or holds {each}; choose another folder")
        if _is_occupied(path) and not force:
            raise RecipeError(_taken(path))
    except (OSError, RuntimeError) as error:  # names too long, links in a circle
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"output.path: {path}: cannot be used: {reason}") from None


def _is_occupied(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return path.is_symlink() or path.exists()
    return any(path.iterdir())


def _taken(path: Path) -> str:
    return f"output.path: {path} is there already; choose another folder, or replace it with --force"


class Writer:
    """A checkpoint that is being written to ``PATH.partial/model`` and renamed to ``PATH`` when it is whole.

    `open` keeps the shards that an earlier run of the same ``plan`` has finished; what is written to their
    tensors is ignored. Until `finish`, `abandon` or `suspend`, `write` may be called from several threads.
    A thread of its own follows the finished tensors in file order and hashes them while they are still in
    the page cache. `abandon` and `suspend` are right after an error anywhere, in `open` too.
    """

    def __init__(self, path: Path, shards: Sequence[Shard], infos: Mapping[str, Info], plan: Mapping[str, str]) -> None:
        self.path = path
        self.journal = Journal(partial_of(path), plan)
        self.folder = self.journal.folder / "model"
        self._shards = shards
        self._infos = infos
        self._places = {name: (shard.file, offset) for shard in shards for name, offset in shard.offsets.items()}
        self._stored = Checkpoint("output", self.folder, self._stored_as(), {})
        self._ready = {name: Event() for name in self._places}
        self._notes: dict[str, Sequence[str]] = {}
        self._stopped = False
        self._files: dict[str, int] = {}
        self._parents = [folder for folder in path.parents if not folder.exists()]
        self._pool = ThreadPoolExecutor(1, "merger-hash")
        self._hashes: Future[None] | None = None

    def _stored_as(self) -> dict[str, Info]:
        """Where each tensor lies in the files."""
        return {
            name: replace(self._infos[name], file=self.folder / file, offset=offset)
            for name, (file, offset) in self._places.items()
        }

    def open(self, *, force: bool = False, tell: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Makes the folder and the shards that are not finished at their full size, and begins to hash.

        ``tell`` hears how many bytes of finished shards were hashed again, of how many.
        """
        self.journal.open(force=force)
        self._keep_finished(tell)
        for shard in self._shards:
            if shard.file not in self.journal.finished:
                self._create(shard)
        _sync(self.folder)
        self._hashes = self._pool.submit(self._hash)

    @property
    def unfinished(self) -> frozenset[str]:
        """The tensors that are still to be written."""
        done = self.journal.finished
        return frozenset(name for shard in self._shards if shard.file not in done for name in shard.offsets)

    def _keep_finished(self, tell: Callable[[int, int], None]) -> None:
        """Keeps each shard that the journal names and that has its hash, and clears away what else is there."""
        finished = self.journal.finished
        total, done = sum(shard.size for shard in self._shards if shard.file in finished), 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            tell(done, total)

        for each in list(finished.values()):
            if not _is_whole(self.folder / each.shard, each.sha256, count):
                del finished[each.shard]
        try:
            self.journal.clear(self.folder)
            if not self.folder.is_dir() or self.folder.is_symlink():
                self.folder.unlink(missing_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._clear()
        except OSError as error:
            raise ResourceError(f"{self.journal.folder}: cannot be cleared: {error.strerror}") from None

    def _clear(self) -> None:
        """Removes all but the finished shards."""
        for each in self.folder.iterdir():
            if each.name not in self.journal.finished:
                remove(each)

    def _create(self, shard: Shard) -> None:
        """The file at its full size, so that a full disk is found before the work; its header is in it."""
        target = self.folder / shard.file
        try:
            file = os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
            self._files[shard.file] = file
            os.posix_fallocate(file, 0, shard.size)
            os.pwrite(file, shard.header, 0)
        except OSError as error:
            raise _resource_error(target, error, shard.size) from None

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Writes ``data`` from byte ``start`` of a tensor on."""
        file, offset = self._places[name]
        if file not in self._files:
            return  # it was finished by an earlier run
        position = offset + start
        try:
            while data:
                count = os.pwrite(self._files[file], data, position)
                data, position = data[count:], position + count
        except OSError as error:
            raise _resource_error(self.folder / file, error, 0) from None

    def done(self, name: str, notes: Sequence[str] = ()) -> None:
        """Says that all bytes of a tensor are written, and what was noted about it."""
        self._notes[name] = notes
        self._ready[name].set()

    def read(self, name: str) -> Tensor | None:
        """A tensor that is whole, by this run or an earlier one; else None."""
        file, _ = self._places[name]
        return self._stored.read(name) if file not in self._files or self._ready[name].is_set() else None

    def _hash(self) -> None:
        """Follows the tensors in file order; each shard that is whole is put on disk, and then in the journal."""
        buffer = memoryview(bytearray(CHUNK))
        for shard in self._shards:
            if shard.file not in self._files:
                continue
            digest = hashlib.sha256(shard.header)
            file = self._files[shard.file]
            try:
                for name, offset in shard.offsets.items():
                    self._ready[name].wait()
                    if self._stopped:
                        return
                    end = offset + self._infos[name].nbytes
                    while offset < end:
                        count = os.preadv(file, [buffer[: min(CHUNK, end - offset)]], offset)
                        digest.update(buffer[:count])
                        offset += count
                        if offset // DIRTY > (offset - count) // DIRTY:
                            os.fdatasync(file)
                os.fsync(file)
                notes = [note for name in shard.offsets for note in self._notes[name]]
                self.journal.add(Finished(shard.file, digest.hexdigest(), notes))
            except OSError as error:
                raise _resource_error(self.folder / shard.file, error, 0) from None

    def digests(self) -> dict[str, str]:
        """The SHA-256 of every shard, once all tensors are done and on disk."""
        assert self._hashes is not None, "it was never opened"
        self._hashes.result()
        return {shard.file: self.journal.finished[shard.file].sha256 for shard in self._shards}

    def finish(self, *, force: bool) -> None:
        """Writes the index and renames the folder into place; whatever was there is replaced only now."""
        if len(self._shards) > 1:
            write_json(self.folder / index_name(self._shards), index(self._shards, self._infos))
        for path in sorted(self.folder.rglob("*")):
            _sync(path)
        _sync(self.folder)
        digests = self.digests()
        self._take_place(force=force)
        self.journal.finished.clear()  # who is stopped from here on leaves nothing unfinished
        for file, sha256 in digests.items():
            note(self.path / file, sha256)
        self.journal.remove()
        self._close()

    def _take_place(self, *, force: bool) -> None:
        """Puts the new folder where the old one is, if any; both are back where they were if that does not last."""
        old = self.journal.folder / "replaced"
        undo: Callable[[], object]
        try:
            if not _is_occupied(self.path):
                os.rename(self.folder, self.path)  # over an empty folder too
                undo = partial(os.rename, self.path, self.folder)
            elif not force:
                raise RecipeError(_taken(self.path))
            elif _exchange(self.folder, self.path):
                undo = partial(_exchange, self.folder, self.path)
            else:
                _rename_both((self.path, old), (self.folder, self.path))
                undo = partial(_rename_both, (self.path, self.folder), (old, self.path))
        except OSError as error:
            raise _resource_error(self.path, error, 0) from None
        try:
            _sync(self.path.parent)
        except ResourceError:
            with contextlib.suppress(OSError):
                undo()
            raise

    def abandon(self) -> None:
        """Stops, and removes what was written so far and the folders that were made for it."""
        self._stop()
        self._remove()
        self._close()

    def suspend(self) -> bool:
        """Stops, and keeps the finished shards for the next run of the same plan; says whether there are any."""
        self._stop()
        kept = self.journal.is_ours and bool(self.journal.finished)
        if kept:
            with contextlib.suppress(OSError):
                self._clear()
        else:
            self._remove()
        self._close()
        return kept

    def _stop(self) -> None:
        self._stopped = True
        for event in self._ready.values():
            event.set()
        self._pool.shutdown(wait=True)

    def _remove(self) -> None:
        if self.journal.is_ours:
            self.journal.remove()
        with contextlib.suppress(OSError):
            for folder in self._parents if self.journal.is_ours else (self.journal.folder, *self._parents):
                folder.rmdir()  # only while nobody has put anything there

    def _close(self) -> None:
        self._pool.shutdown(wait=True)
        self._stored.close()
        for file in self._files.values():
            os.close(file)
        self._files = {}
        self.journal.close()


def _is_whole(file: Path, sha256: str, tell: Callable[[int], None]) -> bool:
    try:
        return not file.is_symlink() and digest(file, tell) == sha256
    except OSError:
        return False  # it is made again


def partial_of(path: Path) -> Path:
    """The folder in which an output is made."""
    return path.with_name(path.name + ".partial")


def left_over(path: Path) -> int:
    """Bytes of disk that an unfinished run of this output holds: the next one goes on with them, or frees them."""
    try:
        return sum(each.lstat().st_blocks * 512 for each in (partial_of(path) / "model").iterdir())
    except OSError:
        return 0


def _rename_both(first: tuple[Path, Path], second: tuple[Path, Path]) -> None:
    """Renames twice, or not at all."""
    os.rename(*first)
    try:
        os.rename(*second)
    except BaseException:
        os.rename(*reversed(first))
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Swaps what two names stand for in one step, which only Linux can (renameat2); False where it cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None or rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return rename is not None
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _resource_error(path: Path, error: OSError, size: int) -> ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        needed = f" ({size:,} bytes are needed for it)" if size else ""
        return ResourceError(f"{path}: the disk is full{needed}; free some space, or write elsewhere")
    return ResourceError(f"{path}: cannot be written: {error.strerror}")


def write_json(path: Path, value: Any) -> None:
    """A JSON file as people like to read it, the same bytes for the same value."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """A file of this content; a full disk is a ResourceError."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise _resource_error(path, error, len(content)) from None


def _sync(path: Path) -> None:
    """Puts a file, or what a folder says of its files, on disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _resource_error(path, error, 0) from None
