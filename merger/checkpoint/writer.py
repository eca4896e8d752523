"""Writing a checkpoint: shards laid out beforehand, filled in any order, hashed as they fill, whole or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from merger.checkpoint.header import ITEM_SIZE, Info
from merger.checkpoint.stored import INDEX, SINGLE
from merger.errors import RecipeError, ResourceError

CHUNK = 8 << 20


@dataclass(frozen=True)
class Shard:
    """One output file: its header, and where each tensor's bytes go."""

    file: str
    header: bytes
    offsets: Mapping[str, int]  # of each tensor in the file, in file order
    size: int


def layout(tensors: Sequence[tuple[str, Info]], shard_size: int) -> list[Shard]:
    """Deals the tensors out to shards of at most ``shard_size`` bytes (or one larger tensor), in order."""
    groups: list[list[tuple[str, Info]]] = [[]]
    filled = 0
    for name, info in tensors:
        if groups[-1] and filled + info.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append((name, info))
        filled += info.nbytes
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(file: str, tensors: list[tuple[str, Info]]) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # widest numbers first, so that every tensor lies at a multiple of its own width
    ordered = sorted(tensors, key=lambda each: -ITEM_SIZE[each[1].dtype])
    offsets, position = {}, 0
    for name, info in ordered:
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        offsets[name] = position
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = {name: start + offset for name, offset in offsets.items()}
    return Shard(file, len(text).to_bytes(8, "little") + text, placed, start + position)


def index(shards: Sequence[Shard], infos: Mapping[str, Info]) -> dict[str, Any]:
    """model.safetensors.index.json of several shards."""
    return {
        "metadata": {"total_size": sum(info.nbytes for info in infos.values())},
        "weight_map": {name: shard.file for shard in shards for name in sorted(shard.offsets)},
    }


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
    """A checkpoint that is being written to ``PATH.partial`` and renamed to ``PATH`` when it is whole.

    Between `open` and `finish` or `abandon`, `write` may be called from several threads. A thread of
    its own follows the finished tensors in file order and hashes them while they are still in the page
    cache. `abandon` is right after an error anywhere, in `open` too.
    """

    def __init__(self, path: Path, shards: Sequence[Shard], infos: Mapping[str, Info]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._shards = shards
        self._infos = infos
        self._places = {name: (shard.file, offset) for shard in shards for name, offset in shard.offsets.items()}
        self._ready = {name: Event() for name in self._places}
        self._stopped = False
        self._lock: int | None = None
        self._files: dict[str, int] = {}
        self._parents = [folder for folder in path.parents if not folder.exists()]
        self._pool = ThreadPoolExecutor(1, "merger-hash")
        self._hashes: Future[dict[str, str]] | None = None

    def open(self) -> None:
        """Makes the folder and its shards at their full size, and begins to hash."""
        self._claim()
        for shard in self._shards:
            self._create(shard)
        self._hashes = self._pool.submit(self._hash)

    def _claim(self) -> None:
        """Makes the folder and locks it; what a dead run left there is removed, but nothing else."""
        lock = self.partial / ".lock"
        try:
            foreign = self.partial.is_dir() and not lock.exists() and any(self.partial.iterdir())
            if foreign or self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
                raise RecipeError(f"{self.partial}: is there already, and no run of merger left it; move it away")
            self.partial.mkdir(parents=True, exist_ok=True)
            claimed = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise ResourceError(f"{self.partial}: cannot be made: {error.strerror}") from None
        try:
            fcntl.flock(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock = claimed
            for left in self.partial.iterdir():
                if left != lock:
                    shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        except BlockingIOError:
            os.close(claimed)
            raise RecipeError(f"{self.partial}: another run is writing it; wait for it or stop it") from None
        except OSError as error:
            raise ResourceError(f"{self.partial}: cannot be cleared: {error.strerror}") from None

    def _create(self, shard: Shard) -> None:
        """The file at its full size, so that a full disk is found before the work; its header is in it."""
        target = self.partial / shard.file
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
        position = offset + start
        try:
            while data:
                count = os.pwrite(self._files[file], data, position)
                data, position = data[count:], position + count
        except OSError as error:
            raise _resource_error(self.partial / file, error, 0) from None

    def done(self, name: str) -> None:
        """Says that all bytes of a tensor are written."""
        self._ready[name].set()

    def _hash(self) -> dict[str, str]:
        buffer = memoryview(bytearray(CHUNK))
        digests = {}
        for shard in self._shards:
            digest = hashlib.sha256(shard.header)
            file = self._files[shard.file]
            try:
                for name, offset in shard.offsets.items():
                    self._ready[name].wait()
                    if self._stopped:
                        return {}
                    end = offset + self._infos[name].nbytes
                    while offset < end:
                        count = os.preadv(file, [buffer[: min(CHUNK, end - offset)]], offset)
                        digest.update(buffer[:count])
                        offset += count
                os.fsync(file)
            except OSError as error:
                raise _resource_error(self.partial / shard.file, error, 0) from None
            digests[shard.file] = digest.hexdigest()
        return digests

    def digests(self) -> dict[str, str]:
        """The sha256 of every shard, once all tensors are done and on disk."""
        assert self._hashes is not None, "it was never opened"
        return self._hashes.result()

    def finish(self, *, force: bool) -> None:
        """Writes the index and renames the folder into place; whatever was there is replaced only now."""
        if len(self._shards) > 1:
            write_json(self.partial / INDEX, index(self._shards, self._infos))
        try:
            for each in self.partial.iterdir():
                _sync(each)
            _sync(self.partial)
            if not _is_occupied(self.path):
                os.rename(self.partial, self.path)  # over an empty folder too
            elif force:
                self._replace()
            else:
                raise RecipeError(_taken(self.path))
            (self.path / ".lock").unlink()
            _sync(self.path)
            _sync(self.path.parent)
        except OSError as error:
            raise _resource_error(self.path, error, 0) from None
        self._close()

    def _replace(self) -> None:
        """Puts the new folder where the old one is, which is gone only after that."""
        with tempfile.TemporaryDirectory(
            prefix=f"{self.path.name}.replaced-", dir=self.path.parent, ignore_cleanup_errors=True
        ) as aside:
            old = Path(aside) / self.path.name
            os.rename(self.path, old)
            try:
                os.rename(self.partial, self.path)
            except BaseException:
                os.rename(old, self.path)
                raise

    def abandon(self) -> None:
        """Stops, and removes what was written so far and the folders that were made for it."""
        self._stopped = True
        for event in self._ready.values():
            event.set()
        self._pool.shutdown(wait=True)
        if self._lock is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in (self.partial, *self._parents) if self._lock is None else self._parents:
                folder.rmdir()  # only while nobody has put anything there
        self._close()

    def _close(self) -> None:
        self._pool.shutdown(wait=True)
        for file in (*self._files.values(), *([] if self._lock is None else [self._lock])):
            os.close(file)
        self._files, self._lock = {}, None


def _resource_error(path: Path, error: OSError, size: int) -> ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        needed = f" ({size:,} bytes are needed for it)" if size else ""
        return ResourceError(f"{path}: the disk is full{needed}; free some space, or write elsewhere")
    return ResourceError(f"{path}: cannot be written: {error.strerror}")


def write_json(path: Path, value: Any) -> None:
    """A JSON file as people like to read it, the same bytes for the same value."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
