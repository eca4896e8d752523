"""Whether a checkpoint is what it says: its files agree with each other, with merger.json, and with its inputs."""

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
from merger.calibration.statistics import origin
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.formats import SUFFIXES
from merger.checkpoint.hashes import digest, sha256
from merger.checkpoint.side_files import is_inside
from merger.checkpoint.tensor_info import ITEM_SIZE
from merger.engine.manifest import RECORD, Manifest, differing, inputs_of, portable, stored_as, versions
from merger.engine.merge_sink import MergeSink, merge_schedule
from merger.engine.prepare import prepare
from merger.engine.recorded_recipe import parse_recorded, recipe_folder
from merger.errors import CheckpointError, RecipeError, VerifyError, system_reason
from merger.options import Notice, Progress, RunOptions
from merger.outputs.consistency import (
    Contents,
    Difference,
    config_differences,
    index_differences,
    look,
    scan,
    tokenizer_differences,
)
from merger.planning.plan import Plan
from merger.recipe.recipe import Recipe


@dataclass(frozen=True)
class Verification:
    """What was looked at, and all that is not as it is said to be."""

    directory: str
    tensors: int
    bytes: int
    recorded: bool  # whether merger made it, and says so in merger.json
    recomputed: tuple[str, ...]  # tensors that were made again from the inputs
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
    """Checks the folder of a checkpoint, whoever wrote it, and returns every difference.

    With ``deep`` some tensors of a merge are merged again from its inputs, and compared bit for bit; the device auto is
    then the kind that the merge was made on. Raises a `MergerError` only where there is nothing to check, or not what
    is needed for it.
    """
    contents = look(Path(directory))
    found = [*contents.broken, *index_differences(contents)]
    hashes, values = _scan(contents, options.progress)
    found += values
    if not contents.packed:  # in which no tensor needs to be what config and tokenizer say of a model's
        found += [*config_differences(contents), *tokenizer_differences(contents)]
    manifest = _manifest(contents, found)
    recomputed: tuple[str, ...] = ()
    if manifest is not None:
        found += _recorded(contents, manifest, hashes)
    elif deep is not None and RECORD not in contents.folder.names:
        raise RecipeError(f"{directory}: has no {RECORD} that says from what it could be made again")
    if deep is not None and manifest is not None:
        recomputed, differences = _recompute(contents, manifest, deep, options)
        found += differences
    return Verification(
        directory=str(directory),
        tensors=len(contents.tensors),
        bytes=sum(info.nbytes for info in contents.tensors.values()),
        recorded=manifest is not None,
        recomputed=recomputed,
        differences=tuple(dict.fromkeys(found)),
    )


def whole_merge(directory: str | Path) -> Manifest:
    """The manifest of a folder that holds all it names, told by names and headers: no weight is read for it.

    Raises CheckpointError for a folder without merger.json, and VerifyError where files are not as it says.
    """
    contents = look(Path(directory))
    if RECORD not in contents.folder.names:
        raise CheckpointError(f"{directory}: has no {RECORD}, so it is no finished merge")
    found = [*contents.broken, *index_differences(contents)]
    manifest = _manifest(contents, found)
    if manifest is not None:
        found += _recorded(contents, manifest, {})
    if found or manifest is None:
        raise VerifyError("\n".join(f"{directory}: {each}" for each in dict.fromkeys(found)))
    return manifest


def _scan(contents: Contents, tell: Progress) -> tuple[dict[str, str], list[Difference]]:
    """The SHA-256 of each file whose format is hashed by the way, and its faulty values; files side by side."""
    total = sum(info.nbytes for header in contents.headers.values() for info in header.values())
    done, lock = Counter[str](), Lock()

    def count(size: int) -> None:
        with lock:
            done["bytes"] += size
            tell("verifying", done["bytes"], total)

    def one(file: str) -> tuple[str | None, list[Difference]]:
        path, header = contents.directory / file, contents.headers[file]
        try:
            return scan(path, header, count)
        except OSError as error:
            return None, [Difference(file, None, f"cannot be read: {system_reason(error)}")]

    with ThreadPoolExecutor(4, "merger-verify") as pool:
        results = list(pool.map(one, contents.headers))
    hashes = {file: sha for file, (sha, _) in zip(contents.headers, results, strict=True) if sha is not None}
    return hashes, [difference for _, differences in results for difference in differences]


# --- what merger.json says ------------------------------------------------------------------------


def _manifest(contents: Contents, found: list[Difference]) -> Manifest | None:
    """The manifest, if there is one and it can be understood; if it cannot, ``found`` gets the reason."""
    if RECORD not in contents.folder.names:
        return None
    try:
        return Manifest.parse((contents.directory / RECORD).read_bytes())
    except OSError as error:
        found.append(Difference(RECORD, None, f"cannot be read: {system_reason(error)}"))
    except ValueError as error:
        found.append(Difference(RECORD, None, str(error)))
    return None


def _recorded(contents: Contents, manifest: Manifest, hashes: Mapping[str, str]) -> Iterator[Difference]:
    """Where shards, side files and tensors are not those of merger.json."""
    for file, sha in manifest.shards.items():
        if file not in contents.folder.names:
            yield Difference(file, None, f"is missing, though {RECORD} names it")
        elif file in hashes and hashes[file] != sha:
            yield _other_hash(file, hashes[file], sha)
    for file in sorted(contents.folder.names - manifest.shards.keys()):
        if file.endswith(SUFFIXES):
            yield Difference(file, None, f"holds weights that {RECORD} does not name")
    for file, sha in manifest.files.items():
        if not is_inside(file) or not (contents.directory / file).is_file():
            yield Difference(file, None, f"is missing, though {RECORD} names it")
        else:
            yield from _side_file(contents.directory, file, sha)
    recorded = manifest.stored_tensors
    for name, wanted in recorded.items():
        info = contents.tensors.get(name)
        if info is None:
            yield Difference(RECORD, name, "is in no file")
        elif stored_as(info) != wanted:
            yield Difference(contents.file_of(name), name, f"is {stored_as(info)}, but {wanted} in {RECORD}")
    for name in contents.tensors:
        if name not in recorded:
            yield Difference(contents.file_of(name), name, f"is not in {RECORD}")


def _side_file(folder: Path, name: str, sha: str) -> Iterator[Difference]:
    try:
        own = digest(folder / name)
    except OSError as error:
        yield Difference(name, None, f"cannot be read: {system_reason(error)}")
    else:
        if own != sha:
            yield _other_hash(name, own, sha)


def _other_hash(file: str, own: str, said: str) -> Difference:
    return Difference(file, None, f"its SHA-256 is {own}, but {said} in {RECORD}")


# --- what the inputs say --------------------------------------------------------------------------


def _recompute(
    contents: Contents, manifest: Manifest, deep: DeepCheck, options: RunOptions
) -> tuple[tuple[str, ...], list[Difference]]:
    """Makes a sample of tensors again by the same merge; their names, and where they differ."""
    device = str(manifest.content.get("device")) if options.device == "auto" else options.device
    recipe = _recipe(contents, manifest, deep.recipe)
    options = replace(options, device=device, progress=_as_recomputing(options.progress))
    with prepare(recipe, options) as prepared:
        plan = prepared.plan
        _note_other_versions(manifest, plan, options.notice)
        changed = list(_changed_inputs(manifest, plan))
        if changed:  # what is made of other inputs says nothing
            return (), changed
        names = _chosen(plan, deep)
        comparison = _Comparison(contents, plan, names)
        schedule = merge_schedule(prepared, comparison.places.keys())
        schedule.run(MergeSink(schedule, comparison))
        statistics = origin(prepared.inputs.files)
    other = differing(manifest.content["statistics"], statistics)
    found = [Difference(RECORD, None, f"statistics.{name}: another SHA-256 than what was found now") for name in other]
    return tuple(names), [*found, *comparison.differences()]


def _note_other_versions(manifest: Manifest, plan: Plan, notice: Notice) -> None:
    """Tells of versions that decide the bytes and are not those of the merge."""
    here = versions(plan)
    others = [name for name, version in manifest.content["versions"].items() if here.get(name) != version]
    if others:
        notice(f"merged with another {', '.join(others)} than it is checked with; last bits may differ for that")


def _recipe(contents: Contents, manifest: Manifest, given: Path | None) -> Recipe:
    """The recorded recipe, with its folder; or the one that is given, if it is the same."""
    recorded, directory = manifest.recipe, contents.directory
    if given is None:
        output = str(recorded["output"]["path"])
        folder = recipe_folder(directory, output)
        if folder is None:
            raise RecipeError(
                f"{directory}: does not lie where its recipe wrote it ({output}); give the recipe, for its inputs"
            )
        return parse_recorded(recorded, directory, folder)
    recipe = Recipe.load(given, manifest.content.get("set", []))
    own = json.loads(json.dumps(portable(recipe.spelled_out())))
    others = [key for key in differing(recorded, own) if key != "output.path"]
    if others:
        raise RecipeError(f"{given}: is not the recipe of {contents.directory}: they differ in {', '.join(others)}")
    return recipe


def _changed_inputs(manifest: Manifest, plan: Plan) -> Iterator[Difference]:
    hashes = {file: sha256(file) for model in plan.models.values() for file in model.files}
    for key, (recorded, _) in differing(manifest.inputs, json.loads(json.dumps(inputs_of(plan, hashes)))).items():
        if recorded is None and key.endswith(".config"):  # an earlier version did not record it
            continue
        yield Difference(RECORD, None, f"inputs.{key}: is not what it was when it was merged")


def _as_recomputing(progress: Progress) -> Progress:
    """The same progress with the step ``merging`` called ``recomputing``."""
    return lambda step, done, total: progress("recomputing" if step == "merging" else step, done, total)


def _chosen(plan: Plan, deep: DeepCheck) -> list[str]:
    """Some tensors, as good as drawn: those whose hash with the seed is smallest."""
    names = list(plan.stored)
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{deep.seed} {name}".encode()).digest())
    return sorted(drawn[: deep.sample], key=names.index)


class _Comparison:
    """Takes the bytes of a merge, and compares them with those of the output."""

    def __init__(self, contents: Contents, plan: Plan, names: Sequence[str]) -> None:
        self.contents = contents
        planned = {name: stored_as(info) for name, info in plan.stored.items()}
        self.misfits = [
            Difference(RECORD, name, f"would be {planned[name]} if it were merged again")
            for name in names
            if name not in contents.tensors or stored_as(contents.tensors[name]) != planned[name]
        ]
        misfits = {each.tensor for each in self.misfits}
        self.places = {name: contents.tensors[name] for name in names if name not in misfits}
        self.differing = Counter[str]()
        self.lock = Lock()

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Compares ``data`` with what stands from byte ``start`` of the tensor on."""
        if name not in self.places:
            return
        info = self.places[name]
        stored = bytearray(len(data))
        with (self.contents.directory / self.contents.file_of(name)).open("rb") as file:
            file.seek(info.offset + start)
            file.readinto(stored)
        if stored != data:
            own, other = (
                torch.frombuffer(each, dtype=torch.uint8).view(-1, ITEM_SIZE[info.dtype]) for each in (stored, data)
            )
            with self.lock:
                self.differing[name] += int((own != other).any(1).sum())

    def done(self, name: str, notes: Sequence[str]) -> None:
        """A tensor that is whole was compared already."""

    def read(self, name: str) -> torch.Tensor | None:
        """What the output has for it."""
        if name not in self.contents.tensors:
            return None
        with Checkpoint("output", self.contents.directory, self.contents.tensors, {}) as output:
            return output.read(name)

    def differences(self) -> Iterator[Difference]:
        """What was found, by tensor."""
        yield from self.misfits
        for name, info in self.places.items():
            if count := self.differing[name]:
                what = f"{count:,} of its {info.elements:,} values are not what its inputs make"
                yield Difference(self.contents.file_of(name), name, what)
