"""A merge from recipe to folder: what the loop makes is written, told of, and named when it is whole."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merger.calibration.statistics import origin, sources
from merger.checkpoint import side_files as manifest
from merger.checkpoint.checkpoint import PACKED, SINGLE
from merger.checkpoint.hashes import sha256
from merger.checkpoint.layout import layout
from merger.checkpoint.writer import Writer, json_bytes, write_bytes, write_json, write_text
from merger.engine.loop import Loop
from merger.engine.machine import peak_device_memory, peak_memory
from merger.engine.manifest import RECORD, decisive, record_of
from merger.engine.prepare import Prepared, prepare
from merger.errors import CheckpointError, RecipeError, UnreadableError
from merger.options import RunOptions
from merger.recipe.recipe import Recipe


@dataclass(frozen=True)
class Result:
    """What a merge did."""

    output: str
    seconds: float
    bytes_read: int
    bytes_written: int
    tensors: dict[str, int]  # how many were merged, copied, dropped
    peak_memory_bytes: int
    peak_device_memory_bytes: int  # of the fullest GPU
    device: str
    seed: int
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return asdict(self)


def merge(recipe: Recipe, options: RunOptions = RunOptions(), *, force: bool = False) -> Result:
    """Merges the experts of ``recipe`` into a checkpoint folder, which appears when it is complete, or not at all.

    ``force`` replaces an output that is there already. Raises a `MergerError` for whatever the user can mend.
    """
    began = time.monotonic()
    output = recipe.folder / Path(recipe.output.path).expanduser()
    with prepare(recipe, options, output, force=force) as prepared:
        return _Merge(prepared, output).run(began, force=force)


# --- the merge ------------------------------------------------------------------------------------


class _Merge:
    """One run: its loop, its writer, and what stands beside the weights."""

    def __init__(self, prepared: Prepared, output: Path) -> None:
        self.plan, self.machine, self.options = prepared.plan, prepared.machine, prepared.options
        self.output = output
        self.statistics_origin = origin(prepared.inputs.statistics)
        self.loop = Loop(prepared)

    def run(self, began: float, *, force: bool) -> Result:
        infos = self.plan.stored
        stem = PACKED if self.plan.packed else SINGLE
        shards = layout(list(infos.items()), self.plan.recipe.output.shard_size, stem)
        for note in self.loop.notes:
            self.options.notice(note)
        writer = Writer(self.output, shards, infos, self._decisive())
        try:
            writer.open(force=force, tell=partial(self.options.progress, "checking"))
            unfinished = writer.unfinished
            self._resume(writer, len(shards))
            with ThreadPoolExecutor(1, "merger-input") as hashing:
                inputs = self._hash_inputs(hashing)
                try:
                    self.loop.run(unfinished, writer)
                    self._write_side_files(writer, inputs)
                except BaseException:
                    hashing.shutdown(wait=False, cancel_futures=True)
                    raise
            written = sum(infos[name].nbytes for name in unfinished)
            writer.finish(force=force)
        except BaseException as error:
            if isinstance(error, RecipeError | CheckpointError) and not isinstance(error, UnreadableError):
                writer.abandon()  # what is made of wrong inputs is not kept
            elif writer.suspend():
                self.options.notice(
                    f"{writer.journal.folder} keeps the finished shards; the same run goes on from there"
                )
            raise
        return self._result(began, written)

    def _decisive(self) -> dict[str, str]:
        """What decides the bytes; Gram matrices are on no file, so what they are made from does."""
        return decisive(self.plan, self.machine.device, {**sources(self.plan), **self.statistics_origin})

    def _resume(self, writer: Writer, shards: int) -> None:
        """Leaves out what an earlier run has finished, and remembers what was noted then."""
        finished = writer.journal.finished
        if finished:
            self.options.notice(
                f"goes on where an earlier run stopped: {len(finished)} of {shards} shards are finished"
            )
        self.loop.notes += dict.fromkeys(note for each in finished.values() for note in each.notes)

    # --- what stands beside the weights ---

    def _hash_inputs(self, pool: Executor) -> dict[Path, Future[str]]:
        """Begins to hash every weight file; those of the Hub's cache are named by their hash already."""
        files = {file for model in self.plan.models.values() for file in model.files}
        return {file: pool.submit(sha256, file) for file in sorted(files)}

    def _write_side_files(self, writer: Writer, hashes: Mapping[Path, Future[str]]) -> None:
        plan, folder = self.plan, writer.folder
        copied = manifest.side_files(plan.base.directory, plan.models[plan.tokenizer].directory)
        files = manifest.copy_side_files(copied, folder)
        config = json_bytes(plan.config)
        write_bytes(folder / "config.json", config)
        files["config.json"] = hashlib.sha256(config).hexdigest()
        record = record_of(
            plan,
            self.machine.device,
            hashes,
            writer.digests(),
            dict(sorted(files.items())),
            sources(plan),
            self.statistics_origin,
            self.loop.notes,
        )
        write_json(folder / RECORD, record)
        card = manifest.card(self.output.name, record["inputs"], record["recipe"], self._counts(), plan.packed)
        write_text(folder / "README.md", card)

    def _counts(self) -> dict[str, int]:
        counts = Counter("merged" if tensor.stages else "copied" for tensor in self.plan.tensors)
        dropped = sum(len(names) for names in self.plan.dropped.values())
        return {"merged": counts["merged"], "copied": counts["copied"], "dropped": dropped}

    def _result(self, began: float, written: int) -> Result:
        return Result(
            output=str(self.output),
            seconds=round(time.monotonic() - began, 3),
            bytes_read=self.loop.done_bytes,
            bytes_written=written,
            tensors=self._counts(),
            peak_memory_bytes=peak_memory(),
            peak_device_memory_bytes=peak_device_memory(self.machine.devices),
            device=", ".join(self.machine.devices),
            seed=self.plan.recipe.seed,
            notes=self.loop.notes,
        )
