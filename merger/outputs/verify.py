"""Checks a checkpoint: its files against each other, against merger.json, and against its inputs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from merger._lazy import torch
from merger.calibration.origins import origin
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.formats import SUFFIXES
from merger.checkpoint.hashes import digest, sha256
from merger.checkpoint.side_files import is_inside
from merger.checkpoint.tensor_info import ITEM_SIZE
from merger.engine.manifest import RECORD, Manifest, inputs_of, portable, stored_as, value_differences, versions
from merger.engine.merge import sink_of
from merger.engine.merge_sink import merge_schedule
from merger.engine.prepare import prepare
from merger.engine.recorded_recipe import parse_recorded, recipe_folder
from merger.errors import CheckpointError, RecipeError, VerifyError, system_reason
from merger.options import Notice, Progress, RunOptions, check_options, path_argument
from merger.outputs.consistency import (
    Contents,
    Difference,
    config_differences,
    index_differences,
    read_contents,
    scan,
    tokenizer_differences,
)
from merger.planning.plan import Plan
from merger.recipe.recipe import Recipe


@dataclass(frozen=True)
class Verification:
    """The result of `verify`."""

    directory: str
    tensors: int
    bytes: int
    recorded: bool  # whether the folder has a readable merger.json
    recomputed: tuple[str, ...]  # tensors that were merged again from the inputs
    differences: tuple[Difference, ...]

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return asdict(self)


@dataclass(frozen=True)
class DeepCheck:
    """The sample of tensors that is merged again from the inputs."""

    sample: int = 16  # number of tensors
    seed: int = 0  # chooses the tensors
    recipe: Path | None = None  # None: the recorded one, seen from where its output path leads to the folder


def verify(directory: str | Path, options: RunOptions = RunOptions(), *, deep: DeepCheck | None = None) -> Verification:
    """Checks the folder of any checkpoint and returns every difference.

    With ``deep`` a sample of tensors is merged again from the inputs and compared bit for bit; the device auto is then
    the kind of device of the merge. Raises a `MergerError` only if the folder or the inputs of the check are missing.
    """
    check_options(options)
    contents = read_contents(path_argument("directory", directory))
    differences = [*contents.faults, *index_differences(contents)]
    hashes, values = _scan_files(contents, options.progress)
    differences += values
    if contents.is_model:  # config and tokenizer describe neither packed tensors nor an adapter's
        differences += [*config_differences(contents), *tokenizer_differences(contents)]
    manifest = _manifest(contents, differences)
    recomputed: tuple[str, ...] = ()
    if manifest is not None:
        differences += _record_differences(contents, manifest, hashes)
    elif deep is not None and RECORD not in contents.folder.names:
        raise RecipeError(f"{directory}: has no {RECORD} that says from what it could be made again")
    if deep is not None and manifest is not None:
        recomputed, recomputed_differences = _recompute(contents, manifest, deep, options)
        differences += recomputed_differences
    return Verification(
        directory=str(directory),
        tensors=len(contents.tensors),
        bytes=sum(info.nbytes for info in contents.tensors.values()),
        recorded=manifest is not None,
        recomputed=recomputed,
        differences=tuple(dict.fromkeys(differences)),
    )


def whole_merge(directory: str | Path) -> Manifest:
    """Returns the manifest of a complete merge, checked by names and headers; reads no weights.

    Raises CheckpointError for a folder without merger.json, and VerifyError if files differ from it.
    """
    contents = read_contents(Path(directory))
    if RECORD not in contents.folder.names:
        raise CheckpointError(f"{directory}: has no {RECORD}, so it is no finished merge")
    differences = [*contents.faults, *index_differences(contents)]
    manifest = _manifest(contents, differences)
    if manifest is not None:
        differences += _record_differences(contents, manifest, {})
    if differences or manifest is None:
        raise VerifyError("\n".join(f"{directory}: {difference}" for difference in dict.fromkeys(differences)))
    return manifest


def _scan_files(contents: Contents, tell: Progress) -> tuple[dict[str, str], list[Difference]]:
    """Scans weight files in parallel; returns the SHA-256 of files whose format computes one, and the differences."""
    total = sum(info.nbytes for header in contents.headers.values() for info in header.values())
    progress, lock = Counter[str](), Lock()

    def count(size: int) -> None:
        with lock:
            progress["bytes"] += size
            tell("verifying", progress["bytes"], total)

    def scan_file(file: str) -> tuple[str | None, list[Difference]]:
        path, header = contents.directory / file, contents.headers[file]
        try:
            return scan(path, header, count)
        except OSError as error:
            return None, [Difference(file, None, f"cannot be read: {system_reason(error)}")]

    with ThreadPoolExecutor(4, "merger-verify") as pool:
        results = list(pool.map(scan_file, contents.headers))
    hashes = {file: sha for file, (sha, _) in zip(contents.headers, results, strict=True) if sha is not None}
    return hashes, [difference for _, differences in results for difference in differences]


# --- merger.json ----------------------------------------------------------------------------------


def _manifest(contents: Contents, differences: list[Difference]) -> Manifest | None:
    """Reads the manifest; for an invalid one, appends the reason to ``differences`` and returns None."""
    if RECORD not in contents.folder.names:
        return None
    try:
        return Manifest.parse((contents.directory / RECORD).read_bytes())
    except OSError as error:
        differences.append(Difference(RECORD, None, f"cannot be read: {system_reason(error)}"))
    except ValueError as error:
        differences.append(Difference(RECORD, None, str(error)))
    return None


def _record_differences(contents: Contents, manifest: Manifest, hashes: Mapping[str, str]) -> Iterator[Difference]:
    """Yields shards, side files and tensors that differ from merger.json."""
    for file, sha in manifest.shards.items():
        if file not in contents.folder.names:
            yield Difference(file, None, f"is missing, though {RECORD} names it")
        elif file in hashes and hashes[file] != sha:
            yield _hash_difference(file, hashes[file], sha)
    for file in sorted(contents.folder.names - manifest.shards.keys()):
        if file.endswith(SUFFIXES):
            yield Difference(file, None, f"holds weights that {RECORD} does not name")
    for file, sha in manifest.files.items():
        if not is_inside(file) or not (contents.directory / file).is_file():
            yield Difference(file, None, f"is missing, though {RECORD} names it")
        else:
            yield from _side_file_differences(contents.directory, file, sha)
    recorded = manifest.stored_tensors
    for name, record in recorded.items():
        info = contents.tensors.get(name)
        if info is None:
            yield Difference(RECORD, name, "is in no file")
        elif stored_as(info) != record:
            yield Difference(contents.file_of(name), name, f"is {stored_as(info)}, but {record} in {RECORD}")
    for name in contents.tensors:
        if name not in recorded:
            yield Difference(contents.file_of(name), name, f"is not in {RECORD}")


def _side_file_differences(folder: Path, name: str, sha: str) -> Iterator[Difference]:
    try:
        file_hash = digest(folder / name)
    except OSError as error:
        yield Difference(name, None, f"cannot be read: {system_reason(error)}")
    else:
        if file_hash != sha:
            yield _hash_difference(name, file_hash, sha)


def _hash_difference(file: str, file_hash: str, recorded_hash: str) -> Difference:
    return Difference(file, None, f"its SHA-256 is {file_hash}, but {recorded_hash} in {RECORD}")


# --- inputs ---------------------------------------------------------------------------------------


def _recompute(
    contents: Contents, manifest: Manifest, deep: DeepCheck, options: RunOptions
) -> tuple[tuple[str, ...], list[Difference]]:
    """Merges a sample of tensors again; returns their names and the differences."""
    device = str(manifest.content.get("device")) if options.device == "auto" else options.device
    recipe = _load_recipe(contents, manifest, deep.recipe)
    options = replace(options, device=device, progress=_as_recomputing(options.progress))
    with prepare(recipe, options) as prepared:
        plan = prepared.plan
        _note_other_versions(manifest, plan, options.notice)
        changed = list(_changed_inputs(manifest, plan))
        if changed:  # what is made of other inputs says nothing
            return (), changed
        names = _sample_names(plan, deep)
        comparison = _Comparison(contents, plan, names)
        schedule = merge_schedule(prepared, comparison.places.keys())
        schedule.run(sink_of(schedule, comparison))
        statistics = origin(prepared.inputs.files)
    statistics_differences = value_differences(manifest.content["statistics"], statistics)
    differences = [
        Difference(RECORD, None, f"statistics.{name}: another SHA-256 than what was found now")
        for name in statistics_differences
    ]
    return tuple(names), [*differences, *comparison.differences()]


def _note_other_versions(manifest: Manifest, plan: Plan, notice: Notice) -> None:
    """Notes versions that decide the bytes and differ from those of the merge."""
    current_versions = versions(plan)
    changed_names = [
        name for name, version in manifest.content["versions"].items() if current_versions.get(name) != version
    ]
    if changed_names:
        notice(f"merged with another {', '.join(changed_names)} than it is checked with; last bits may differ for that")


def _load_recipe(contents: Contents, manifest: Manifest, path: Path | None) -> Recipe:
    """Returns the recorded recipe with its folder, or the recipe at ``path``; raises RecipeError if they differ."""
    recorded, directory = manifest.recipe, contents.directory
    if path is None:
        output = str(recorded["output"]["path"])
        folder = recipe_folder(directory, output)
        if folder is None:
            raise RecipeError(
                f"{directory}: does not lie where its recipe wrote it ({output}); give the recipe, for its inputs"
            )
        return parse_recorded(recorded, directory, folder)
    recipe = Recipe.load(path, manifest.content.get("set", []))
    content = json.loads(json.dumps(portable(recipe.spelled_out())))
    changed_keys = [key for key in value_differences(recorded, content) if key != "output.path"]
    if changed_keys:
        raise RecipeError(
            f"{path}: is not the recipe of {contents.directory}: they differ in {', '.join(changed_keys)}"
        )
    return recipe


def _changed_inputs(manifest: Manifest, plan: Plan) -> Iterator[Difference]:
    hashes = {file: sha256(file) for model in plan.models.values() for file in model.files}
    for key, (recorded, _) in value_differences(
        manifest.inputs, json.loads(json.dumps(inputs_of(plan, hashes)))
    ).items():
        if recorded is None and key.endswith(".config"):  # an earlier version did not record it
            continue
        yield Difference(RECORD, None, f"inputs.{key}: is not what it was when it was merged")


def _as_recomputing(progress: Progress) -> Progress:
    """Returns a progress callback that renames the step ``merging`` to ``recomputing``."""
    return lambda step, count, total: progress("recomputing" if step == "merging" else step, count, total)


def _sample_names(plan: Plan, deep: DeepCheck) -> list[str]:
    """Returns a random sample of tensor names: those whose hash with the seed is smallest."""
    names = list(plan.stored)
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{deep.seed} {name}".encode()).digest())
    return sorted(drawn[: deep.sample], key=names.index)


class _Comparison:
    """A sink that compares the bytes of a merge with those of the output."""

    def __init__(self, contents: Contents, plan: Plan, names: Sequence[str]) -> None:
        self.contents = contents
        planned = {name: stored_as(info) for name, info in plan.stored.items()}
        self.misfits = [
            Difference(RECORD, name, f"would be {planned[name]} if it were merged again")
            for name in names
            if name not in contents.tensors or stored_as(contents.tensors[name]) != planned[name]
        ]
        misfits = {difference.tensor for difference in self.misfits}
        self.places = {name: contents.tensors[name] for name in names if name not in misfits}
        self.value_counts = Counter[str]()
        self.lock = Lock()

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Compares ``data`` with the bytes of the output's tensor from ``start`` on."""
        if name not in self.places:
            return
        info = self.places[name]
        stored = bytearray(len(data))
        with (self.contents.directory / self.contents.file_of(name)).open("rb") as file:
            file.seek(info.offset + start)
            file.readinto(stored)
        if stored != data:
            stored_items, merged_items = (
                torch.frombuffer(buffer, dtype=torch.uint8).view(-1, ITEM_SIZE[info.dtype]) for buffer in (stored, data)
            )
            with self.lock:
                self.value_counts[name] += int((stored_items != merged_items).any(1).sum())

    def finish_tensor(self, name: str, notes: Sequence[str]) -> None:
        """Does nothing: `write` has compared the tensor."""

    def read(self, name: str) -> torch.Tensor | None:
        """Reads a tensor of the output; None if the output does not hold it."""
        if name not in self.contents.tensors:
            return None
        with Checkpoint("output", self.contents.directory, self.contents.tensors, {}) as output:
            return output.read(name)

    def differences(self) -> Iterator[Difference]:
        """Yields the differences by tensor."""
        yield from self.misfits
        for name, info in self.places.items():
            if count := self.value_counts[name]:
                message = f"{count:,} of its {info.elements:,} values are not what its inputs make"
                yield Difference(self.contents.file_of(name), name, message)
