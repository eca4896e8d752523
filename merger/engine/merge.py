"""A merge from recipe to folder: what the loop makes is written, told of, and named when it is whole."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merger.calibration.statistics import Options, grams, keep_grams, origin, sources
from merger.calibration.statistics import calibrate as statistics_files
from merger.calibration.statistics_files import copy
from merger.checkpoint import side_files as manifest
from merger.checkpoint.checkpoint import PACKED, SINGLE
from merger.checkpoint.files import json_bytes, write_bytes, write_json, write_text
from merger.checkpoint.hashes import sha256
from merger.checkpoint.layout import layout
from merger.checkpoint.placement import check_output
from merger.checkpoint.writer import Writer
from merger.engine.loop import Blocks, Loop, Progress, Sink
from merger.engine.machine import Machine, peak_device_memory, peak_memory
from merger.engine.manifest import RECORD, decisive, record_of
from merger.engine.preflight import check_disk, check_place
from merger.errors import CheckpointError, RecipeError, UnreadableError
from merger.ops import kernels
from merger.planning.plan import Plan
from merger.planning.planner import plan as make_plan
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


_SLOW = "merger was installed without its compiled loops, so this takes several times as long; a C compiler makes them"


def merge(
    recipe: Recipe,
    *,
    device: str = "auto",
    max_memory: int | None = None,
    offline: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Result:
    """Merges what ``recipe`` says into a checkpoint folder, which appears whole or not at all.

    ``device`` is auto, cpu, cuda (all) or cuda:i; ``max_memory`` caps host memory in bytes; ``force`` replaces
    an output that is there already. Raises a `MergerError` for whatever the user can mend.
    """
    began = time.monotonic()
    output = recipe.folder / Path(recipe.output.path).expanduser()
    check_output(output, recipe.folders(), beside=recipe.surroundings(), force=force)  # before any download
    plan = make_plan(recipe, offline=offline, headers_only=False)
    try:
        check_place(plan, output, force=force)
        check_disk(plan, output)
        machine = Machine.of(device, max_memory, plan)
        tell, say = progress or _silent, notice or _silent
        if machine.device == "cpu" and not kernels.compiled():
            say(_SLOW)
        options = Options(machine.device, machine.hidden, trust_remote_code)
        paths = statistics_files(plan, options, notice=say, progress=tell) if plan.needs_statistics else {}
        blocks = partial(grams, plan, options, notice=say, progress=tell)
        loop = Loop(plan, machine, paths, blocks, tell, say)
        return _Merge(loop, output, origin(paths)).run(began, force=force)
    finally:
        plan.close()


def recompute(
    plan: Plan,
    names: Set[str],
    sink: Sink,
    *,
    device: str = "auto",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Merges the tensors ``names`` of a plan again and gives their bytes to ``sink``, maybe others' too.

    Returns the SHA-256 of the statistics that were used, by expert.
    """
    machine = Machine.of(device, max_memory, plan)
    tell, say = progress or _silent, notice or _silent
    options = Options(machine.device, machine.hidden, trust_remote_code)
    paths = statistics_files(plan, options, notice=say, progress=tell) if plan.needs_statistics else {}
    blocks = partial(grams, plan, options, notice=say, progress=tell)
    carry_out(plan, machine, names, sink, paths, blocks, progress=tell, notice=say)
    return origin(paths)


def carry_out(
    plan: Plan,
    machine: Machine,
    names: Set[str],
    sink: Sink,
    statistics: Mapping[str, Path],
    blocks: Blocks,
    *,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> None:
    """Merges the tensors ``names`` of a plan into ``sink``, given the statistics files and Gram matrices it needs."""
    Loop(plan, machine, statistics, blocks, progress or _silent, notice or _silent).run(names, sink)


def calibrate(
    recipe: Recipe,
    *,
    to: Path | None = None,
    gram: bool = False,
    device: str = "auto",
    max_memory: int | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> dict[str, Path]:
    """Makes the statistics of a recipe's experts, or finds them; with ``to`` copies them to a folder.

    With ``gram`` they hold Gram matrices, as large as the models, and are made in ``to`` itself, where an
    unfinished one is gone on with. Returns the file or folder of each expert, as ``calibration: {stats: ...}`` of
    a recipe takes them.
    """
    plan = make_plan(recipe, offline=offline, headers_only=False)
    try:
        machine = Machine.of(device, max_memory, plan)
        options = Options(machine.device, machine.hidden, trust_remote_code)
        if gram:
            _check_grams(plan)
            return keep_grams(plan, options, to, notice=notice or _silent, progress=progress or _silent)
        if not plan.needs_statistics:
            raise RecipeError(
                "no stage of this recipe needs statistics that are kept: there is nothing to calibrate"
                + (" (--gram keeps Gram matrices)" if any(tensor.gram for tensor in plan.tensors) else "")
            )
        paths = statistics_files(plan, options, notice=notice or _silent, progress=progress or _silent)
    finally:
        plan.close()
    if to is None:
        return paths
    return copy(paths, to)


def _check_grams(plan: Plan) -> None:
    """RecipeError if the recipe needs no Gram matrices, or none that can be made beforehand."""
    if not any(tensor.gram for tensor in plan.tensors):
        raise RecipeError("no stage of this recipe takes Gram matrices: there is nothing to keep with --gram")
    if any(tensor.fed_by_merged for tensor in plan.tensors):
        raise RecipeError("inputs: merged makes Gram matrices while it merges: there is nothing to keep with --gram")


# --- the merge ------------------------------------------------------------------------------------


class _Merge:
    """One run: its loop, its writer, and what stands beside the weights."""

    def __init__(self, loop: Loop, output: Path, statistics_origin: dict[str, str]) -> None:
        self.loop, self.plan, self.machine = loop, loop.plan, loop.machine
        self.tell, self.notice = loop.tell, loop.notice
        self.output = output
        self.statistics_origin = statistics_origin

    def run(self, began: float, *, force: bool) -> Result:
        infos = self.plan.stored
        stem = PACKED if self.plan.packed else SINGLE
        shards = layout(list(infos.items()), self.plan.recipe.output.shard_size, stem)
        for note in self.loop.notes:
            self.notice(note)
        writer = Writer(self.output, shards, infos, self._decisive())
        try:
            writer.open(force=force, tell=partial(self.tell, "checking"))
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
                self.notice(f"{writer.journal.folder} keeps the finished shards; the same run goes on from there")
            raise
        return self._result(began, written)

    def _decisive(self) -> dict[str, str]:
        """What decides the bytes; Gram matrices are on no file, so what they are made from does."""
        return decisive(self.plan, self.machine.device, {**sources(self.plan), **self.statistics_origin})

    def _resume(self, writer: Writer, shards: int) -> None:
        """Leaves out what an earlier run has finished, and remembers what was noted then."""
        finished = writer.journal.finished
        if finished:
            self.notice(f"goes on where an earlier run stopped: {len(finished)} of {shards} shards are finished")
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


def _silent(*_: object) -> None:
    """Tells nobody."""
