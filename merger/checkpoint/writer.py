"""Writing a checkpoint: shards filled in any order, hashed as they fill, complete or absent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.disk import CHUNK, allocate, disk_error, read_at, sync, sync_data, sync_open
from merger.checkpoint.files import write_json
from merger.checkpoint.journal import Finished
from merger.checkpoint.layout import Shard, index, index_name
from merger.checkpoint.open_files import OpenFiles
from merger.checkpoint.output import Output
from merger.checkpoint.tensor_info import Info

if TYPE_CHECKING:
    from torch import Tensor

DIRTY = 256 << 20
"""Bytes of a shard after which the disk is made to write: at the end there is little left to wait for."""


class Writer(Output):
    """The shards of a checkpoint in the making.

    `open` keeps the shards that an earlier run of the same ``plan`` has finished; whatever is written to their
    tensors is ignored. Until `finish`, `abandon` or `suspend`, `write` may be called from several threads.
    A thread of its own follows the finished tensors in file order and hashes them while they are still in
    the page cache; shards with a tensor of ``last``, which is written after all others, come last there.
    """

    def __init__(
        self,
        path: Path,
        shards: Sequence[Shard],
        infos: Mapping[str, Info],
        plan: Mapping[str, str],
        *,
        last: Collection[str] = (),
    ) -> None:
        super().__init__(path, plan)
        self._shards = shards
        self._last = frozenset(last)
        self._infos = infos
        self._places = {name: (shard.file, offset) for shard in shards for name, offset in shard.offsets.items()}
        self._stored = Checkpoint("output", self.folder, self._stored_infos(), {})
        self._written_events = {name: Event() for name in self._places}
        self._notes: dict[str, Sequence[str]] = {}
        self._stopped = False
        self._begun: set[str] = set()  # the shards that this run writes
        self._files = OpenFiles(os.O_RDWR)
        self._pool = ThreadPoolExecutor(1, "merger-hash")
        self._hashing: Future[None] | None = None

    def _stored_infos(self) -> dict[str, Info]:
        """Where each tensor lies in the files."""
        return {
            name: self._infos[name]._replace(file=self.folder / file, offset=offset)
            for name, (file, offset) in self._places.items()
        }

    def open(self, *, force: bool = False, tell: Callable[[int, int], None] = lambda count, total: None) -> None:
        """Opens the output, creates the unfinished shards at their full size and starts the hashing thread."""
        super().open(force=force, tell=tell)
        for shard in self._shards:
            if shard.file not in self.journal.finished:
                self._create(shard)
        sync(self.folder)
        self._hashing = self._pool.submit(self._finish_shards)

    @property
    def unfinished(self) -> frozenset[str]:
        """The tensors of shards that no run has finished; all of a shard's tensors are written anew."""
        finished_files = self.journal.finished
        return frozenset(name for shard in self._shards if shard.file not in finished_files for name in shard.offsets)

    def _create(self, shard: Shard) -> None:
        """Makes a file at its full size, so that a full disk is found before the work; its header is in it."""
        with self._descriptor(shard.file, os.O_CREAT | os.O_EXCL, shard.size) as descriptor:
            allocate(descriptor, shard.size)
            os.pwrite(descriptor, shard.header, 0)
        self._begun.add(shard.file)

    @contextmanager
    def _descriptor(self, file: str, flags: int = 0, size: int = 0) -> Iterator[int]:
        """The descriptor of a shard's file; ResourceError if the disk fails, with the ``size`` that the file needs."""
        path = self.folder / file
        try:
            with self._files.use(path, flags) as descriptor:
                yield descriptor
        except OSError as error:
            raise disk_error(path, error, size) from None

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Writes ``data`` from byte ``start`` of a tensor on.

        Raises ResourceError if the disk fails, or has failed under the thread that hashes.
        """
        file, offset = self._places[name]
        if file not in self._begun:
            return  # it was finished by an earlier run
        if self._hashing is not None and self._hashing.done():
            self._hashing.result()
        position = offset + start
        with self._descriptor(file) as descriptor:
            while data:
                count = os.pwrite(descriptor, data, position)
                data, position = data[count:], position + count

    def finish_tensor(self, name: str, notes: Sequence[str] = ()) -> None:
        """Says that all bytes of a tensor are written, with the remarks on it."""
        self._notes[name] = notes
        self._written_events[name].set()

    def read(self, name: str) -> Tensor | None:
        """A tensor that is complete, by this run or an earlier one; else None."""
        file, _ = self._places[name]
        return self._stored.read(name) if file not in self._begun or self._written_events[name].is_set() else None

    def _finish_shards(self) -> None:
        """Finishes shard after shard, until all are finished or the writer is stopped."""
        buffer = memoryview(bytearray(CHUNK))
        for shard in sorted(self._shards, key=lambda shard: not self._last.isdisjoint(shard.offsets)):
            if shard.file in self._begun and not self._finish_shard(shard, buffer):
                return

    def _finish_shard(self, shard: Shard, buffer: memoryview) -> bool:
        """Hashes a shard as its tensors become complete, puts it on disk, and only then notes it in the journal.

        Returns False if the writer was stopped before.
        """
        digest = hashlib.sha256(shard.header)
        for name, offset in shard.offsets.items():
            self._written_events[name].wait()
            if self._stopped:
                return False
            self._hash_tensor(digest, shard.file, offset, offset + self._infos[name].nbytes, buffer)
        with self._descriptor(shard.file) as descriptor:
            sync_open(descriptor)
        notes = [note for name in shard.offsets for note in self._notes[name]]
        self.journal.add(Finished(shard.file, digest.hexdigest(), notes))
        return True

    def _hash_tensor(self, digest: hashlib._Hash, file: str, offset: int, end: int, buffer: memoryview) -> None:
        """Adds the bytes of a file from ``offset`` to ``end`` to the digest."""
        with self._descriptor(file) as descriptor:
            while offset < end:
                count = read_at(descriptor, buffer[: min(CHUNK, end - offset)], offset)
                digest.update(buffer[:count])
                offset += count
                if offset // DIRTY > (offset - count) // DIRTY:
                    sync_data(descriptor)

    def digests(self) -> dict[str, str]:
        """The SHA-256 of every shard, once all tensors are done and on disk."""
        assert self._hashing is not None, "it was never opened"
        self._hashing.result()
        return {shard.file: self.journal.finished[shard.file].sha256 for shard in self._shards}

    def finish(self, *, force: bool) -> None:
        """Writes the index and renames the folder into place; only then replaces an earlier output."""
        if len(self._shards) > 1:
            write_json(self.folder / index_name(self._shards), index(self._shards, self._infos))
        self.digests()
        super().finish(force=force)

    def abandon(self) -> None:
        """Stops, and removes the written files and the folders that were created for them."""
        self._stop()
        super().abandon()

    def suspend(self) -> bool:
        """Stops, and keeps the finished shards for the next run of the same plan; returns whether there are any."""
        self._stop()
        return super().suspend()

    def close(self) -> None:
        """Closes the files, and lets another run have the folder."""
        self._pool.shutdown(wait=True)
        self._stored.close()
        self._files.close()
        super().close()

    def _stop(self) -> None:
        self._stopped = True
        for event in self._written_events.values():
            event.set()
        self._pool.shutdown(wait=True)
