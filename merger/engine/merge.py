"""A merge from recipe to folder: it is written beside its place, and gets its name when it is complete."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merger._display import html_table, size_text
from merger.calibration.origins import origin
from merger.calibration.provider import block_providers, origins
from merger.calibration.statistics import statistics_keys
from merger.checkpoint import side_files
from merger.checkpoint.checkpoint import PACKED, SINGLE
from merger.checkpoint.files import write_text
from merger.checkpoint.folder import ADAPTER
from merger.checkpoint.hashes import sha256
from merger.checkpoint.layout import Shard, layout
from merger.checkpoint.writer import Writer
from merger.engine.adapter_sink import AdapterSink
from merger.engine.machine import peak_device_memory, peak_memory
from merger.engine.manifest import Manifest, decisive
from merger.engine.merge_sink import ByteSink, MergeSink, merge_schedule
from merger.engine.prepare import Prepared, prepare
from merger.engine.schedule import Schedule
from merger.errors import CheckpointError, RecipeError, UnreadableError
from merger.options import Notice, RunOptions
from merger.planning.plan import Plan
from merger.planning.sample import sample_changes, sample_notes
from merger.recipe.recipe import Recipe, as_recipe


@dataclass(frozen=True)
class Result:
    """The result of a merge."""

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
    packed: list[str]  # the experts that the output holds apart; empty where it is one model

    def __repr__(self) -> str:
        return f"Result({self.summary})"

    def _repr_html_(self) -> str:
        rows = [
            ("output", self.output),
            *((f"tensors {action}", count) for action, count in self.tensors.items() if count),
            ("read", size_text(self.bytes_read)),
            ("written", size_text(self.bytes_written)),
            ("time", f"{self.seconds:.1f} s on {self.device}"),
            ("peak memory", size_text(self.peak_memory_bytes)),
            *(("note", note) for note in self.notes),
        ]
        return html_table("Result of a merge", ("", ""), rows)

    @property
    def summary(self) -> str:
        """The output, the number of tensors, bytes, seconds and memory in a line."""
        counts = ", ".join(f"{count} {action}" for action, count in self.tensors.items() if count)
        return (
            f"{self.output}: {counts} tensors; "
            f"read {size_text(self.bytes_read)}, wrote {size_text(self.bytes_written)} "
            f"in {self.seconds:.1f} s on {self.device}, peak memory {size_text(self.peak_memory_bytes)}"
        )

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return asdict(self)


def merge(
    recipe: Recipe | str | Path,
    options: RunOptions = RunOptions(),
    *,
    force: bool = False,
    remarks: Sequence[str] = (),
) -> Result:
    """Merges the experts of a recipe into a checkpoint folder, which appears when it is complete, or not at all.

    ``recipe`` may be the path of its file. ``force`` replaces an output that is there already. ``remarks`` come first
    among the recorded notes. Raises a `MergerError` for whatever the user can mend.
    """
    began = time.monotonic()
    recipe = as_recipe(recipe)
    output = recipe.folder / Path(recipe.output.path).expanduser()
    with prepare(recipe, options, output, force=force) as prepared:
        plan = prepared.plan
        statistics = origin(prepared.inputs.files)
        plan_notes = [*remarks, *plan.notes, *sample_notes(sample_changes(plan))]
        for note in plan_notes:
            options.notice(note)
        infos, shards = plan.stored, _shards(plan)
        last = [name for tensor in plan.tensors if tensor.follows_blocks for name in plan.written_names(tensor)]
        writer = Writer(output, shards, infos, decisive_inputs(prepared, statistics), last=last)
        with _kept_for_the_next_run(writer, options.notice):
            writer.open(force=force, tell=partial(options.progress, "checking"))
            notes = [*plan_notes, *_earlier_notes(writer, len(shards), options.notice)]
            unfinished = writer.unfinished
            schedule = merge_schedule(prepared, unfinished | plan.left_out if unfinished else unfinished)
            with _hashed_inputs(plan) as hashes:
                schedule.run(sink_of(schedule, writer))
                notes = list(dict.fromkeys([*notes, *schedule.notes.all()]))
                _write_side_files(prepared, writer, hashes, statistics, notes)
            writer.finish(force=force)
    return Result(
        output=str(output),
        seconds=round(time.monotonic() - began, 3),
        bytes_read=schedule.progress.done,
        bytes_written=sum(infos[name].nbytes for name in unfinished),
        tensors=_counts(plan),
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=peak_device_memory(prepared.machine.devices),
        device=", ".join(prepared.machine.devices),
        seed=recipe.seed,
        notes=notes,
        packed=list(recipe.experts) if plan.packed else [],
    )


def sink_of(schedule: Schedule, output: ByteSink) -> MergeSink:
    """The sink that writes a merge in the form of its output."""
    is_adapter = schedule.plan.recipe.output.form == "adapter"
    return AdapterSink(schedule, output) if is_adapter else MergeSink(schedule, output)


def _shards(plan: Plan) -> list[Shard]:
    """The files of the output's tensors; peft reads an adapter from one file."""
    tensors, output = list(plan.stored.items()), plan.recipe.output
    if output.form == "adapter":
        return layout(tensors, plan.bytes_written, ADAPTER[0])
    return layout(tensors, output.shard_size, PACKED if plan.packed else SINGLE)


def decisive_inputs(prepared: Prepared, statistics: Mapping[str, str]) -> dict[str, str]:
    """Returns hashes of everything that decides the shards' bytes; a run resumes shards with equal hashes.

    ``statistics`` are the SHA-256s of statistics files. Gram matrices are in no file, so their keys stand for them.
    """
    plan = prepared.plan
    keys = statistics_keys(plan, prepared.options) if block_providers(plan) else {}
    blocks = {f"inputs of blocks of {name}": key.folder_name() for name, key in keys.items()}
    return decisive(plan, prepared.machine.device, {**origins(plan), **blocks, **statistics})


@contextmanager
def _kept_for_the_next_run(writer: Writer, notice: Notice) -> Iterator[None]:
    """Keeps finished shards after an error; those of wrong inputs are removed."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, RecipeError | CheckpointError) and not isinstance(error, UnreadableError):
            writer.abandon()
        elif writer.suspend():
            notice(f"{writer.journal.folder} keeps the finished shards; the same run goes on from there")
        raise


def _earlier_notes(writer: Writer, shards: int, notice: Notice) -> list[str]:
    """The remarks on the tensors of shards that an earlier run has finished."""
    finished = writer.journal.finished
    if finished:
        notice(f"goes on where an earlier run stopped: {len(finished)} of {shards} shards are finished")
    return [note for shard in finished.values() for note in shard.notes]


@contextmanager
def _hashed_inputs(plan: Plan) -> Iterator[dict[Path, Future[str]]]:
    """The SHA-256 of every weight file, computed beside the merge; files of the Hub's cache are named by theirs."""
    files = {file for model in plan.models.values() for file in model.files}
    with ThreadPoolExecutor(1, "merger-input") as pool:
        try:
            yield {file: pool.submit(sha256, file) for file in sorted(files)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_side_files(
    prepared: Prepared,
    writer: Writer,
    hashes: Mapping[Path, Future[str]],
    statistics: Mapping[str, str],
    notes: Sequence[str],
) -> None:
    """Writes config, tokenizer, manifest and card beside the weights."""
    plan, folder = prepared.plan, writer.folder
    files = side_files.write_side_files(plan.side_files, folder)
    manifest = Manifest.of_merge(
        plan,
        prepared.machine.device,
        inputs=hashes,
        shards=writer.digests(),
        files=files,
        calibration=origins(plan),
        statistics=statistics,
        notes=notes,
    )
    manifest.write(folder)
    form: side_files.Form = "pack" if plan.packed else plan.recipe.output.form
    card = side_files.card(
        writer.path.name, manifest.inputs, manifest.recipe, _counts(plan), form, was_quantised=plan.base.is_decoded
    )
    write_text(folder / "README.md", card)


def _counts(plan: Plan) -> dict[str, int]:
    """How many tensors are merged, copied and dropped."""
    outputs = [tensor for tensor in plan.tensors if tensor.factors != {}]
    counts = Counter("merged" if tensor.stages else "copied" for tensor in outputs)
    dropped = sum(len(names) for names in plan.dropped.values())
    return {"merged": counts["merged"], "copied": counts["copied"], "dropped": dropped}
