"""recipe.lock: what a recipe comes to on the day it is locked, and whether it still does."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any

from merger.calibration.provider import origins
from merger.checkpoint import hub, side_files
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.files import check_replaceable, json_bytes, replace_bytes
from merger.checkpoint.hashes import config_digest, digest, note, noted, sha256
from merger.engine.machine import chosen_devices
from merger.engine.manifest import Manifest, differing, inexact, portable, sources_of, tensor_records, versions
from merger.errors import CheckpointError, MergerError, RecipeError, system_reason
from merger.options import Progress, RunOptions
from merger.outputs.verify import whole_merge
from merger.planning.plan import Plan
from merger.planning.planner import plan
from merger.recipe.recipe import Recipe

FORMAT = 2  # since 2 with the configs of all inputs, and with the kind of device where it decides the bytes
_PARTS = ("versions", "device", "recipe", "inputs", "calibration", "files", "tensors")


def lock(recipe: Recipe, path: str | Path, options: RunOptions = RunOptions()) -> dict[str, Any]:
    """Writes to ``path`` what the recipe comes to: defaults spelled out, inputs by commit and SHA-256, versions.

    Of a Hub repository only configs and headers are fetched. A file that is there is replaced if it is a lock.
    """
    target = Path(path)
    check_replaceable(target, is_ours=_is_lock)
    content = _resolved(recipe, options)
    replace_bytes(target, json_bytes(content))
    return content


def lock_of(recipe: str | Path) -> Path:
    """The lock of a recipe's file: recipe.lock beside recipe.yaml."""
    path = Path(recipe).with_suffix(".lock")
    if path == Path(recipe):
        raise RecipeError(f"{recipe}: is named as its own lock would be; name it {path.stem}.yaml")
    return path


def check_lock(recipe: Recipe, path: str | Path, options: RunOptions = RunOptions()) -> None:
    """RecipeError if the recipe comes to anything else than the lock at ``path`` says, naming all of it."""
    locked, now = _read(Path(path)), _resolved(recipe, options)
    faults = [
        f"{path}: {key} was {_said(one)} when it was locked, and is {_said(other)}"
        for key, (one, other) in _differing(locked, now).items()
    ]
    if faults:
        raise RecipeError([*faults, f"{path}: lock the recipe again if that is meant"])


def is_done(recipe: Recipe, path: str | Path, options: RunOptions = RunOptions(), *, trust_mtime: bool = False) -> bool:
    """Whether the output is there, was made of what the lock at ``path`` says, and is whole: one pass of hashing.

    ``trust_mtime`` takes a shard for what it was when it last had this size and time of change, and reads only headers.
    """
    output = recipe.folder / Path(recipe.output.path).expanduser()
    try:
        manifest = Manifest.read(output)
    except CheckpointError:
        return False
    device = manifest.content["device"] if manifest.content["device-dependent"] else None
    made = {**{key: manifest.content[key] for key in _PARTS}, "tensors": _hash(manifest.tensors), "device": device}
    if _differing(_read(Path(path)), made):
        return False
    try:
        whole_merge(output)
    except MergerError:
        return False
    shards = {output / file: str(sha) for file, sha in manifest.shards.items()}
    unread = {file: sha for file, sha in shards.items() if not (trust_mtime and noted(file) == sha)}
    return _have(unread, options.progress)


def _have(shards: Mapping[Path, str], tell: Progress) -> bool:
    """Whether files have these SHA-256; those that have are noted."""
    total, done, lock = sum(file.stat().st_size for file in shards), Counter[str](), Lock()

    def count(size: int) -> None:
        with lock:
            done["bytes"] += size
            tell("verifying", done["bytes"], total)

    def has(file: Path) -> bool:
        same = digest(file, count) == shards[file]
        if same:
            note(file, shards[file])
        return same

    try:
        with ThreadPoolExecutor(4, "merger-verify") as pool:
            return all(list(pool.map(has, shards)))
    except OSError:
        return False  # whoever replaces it need not read it


# --- what a lock holds ----------------------------------------------------------------------------


def _resolved(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """What merger.json will say of a merge, as far as it is known before it; the device where it decides the bytes."""
    with closing(plan(recipe, offline=options.offline)) as made:
        device = chosen_devices(options.device)[0].partition(":")[0] if inexact(made) else None
        content = {
            "format": FORMAT,
            "versions": versions(made),
            "device": device,
            "recipe": portable(recipe.spelled_out()),
            "inputs": {label: _input(made, label, offline=options.offline) for label in made.models},
            "calibration": origins(made),
            "files": _files(made),
            "tensors": _hash(tensor_records(made)),
        }
    unknown = [name for name, sha in origins(made).items() if sha is None]
    if unknown:
        raise RecipeError(f"calibration: {', '.join(unknown)} is no file here, and may change; save it to lock it")
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _input(made: Plan, label: str, *, offline: bool) -> dict[str, Any]:
    source = {"base": made.recipe.base, **made.recipe.experts}[label]
    model = made.models[label]
    adapter = model.adapter
    on_top = [file for file in model.files if adapter is not None and file.parent == adapter.directory]
    own = [file for file in model.files if file not in on_top]
    said = {**sources_of(source), **_content(model, source.model, own, label, offline=offline)}
    said["config"] = config_digest(model)
    if adapter is None or source.adapter is None:
        return said
    return {**said, "adapter": _content(adapter, source.adapter, on_top, label, offline=offline)}


def _content(model: Checkpoint, source: str, files: list[Path], label: str, *, offline: bool) -> dict[str, Any]:
    if model.commit is None:
        return {"files": {file.name: sha256(file) for file in files}}
    known = {file.name: sha256(file) for file in files} if offline else hub.weight_hashes(source, model.commit, label)
    return {"commit": model.commit, "files": known}


def _files(made: Plan) -> dict[str, str]:
    """The SHA-256 of each file that will stand beside the weights."""
    contents = {name: side_files.side_file_content(source) for name, source in made.side_files.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- what differs from it -------------------------------------------------------------------------


def _is_lock(path: Path) -> bool:
    """Whether a file is a lock, also of another version of merger."""
    try:
        locked = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(locked, dict) and locked.keys() >= {"format", "versions", "recipe", "inputs"}


def _read(path: Path) -> dict[str, Any]:
    try:
        locked = json.loads(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {system_reason(error)}; make it with `merger lock`") from None
    except (ValueError, RecursionError):
        locked = None
    if not isinstance(locked, dict) or locked.get("format") != FORMAT or not locked.keys() >= set(_PARTS):
        raise RecipeError(f"{path}: is no lock that this merger understands; make it again with `merger lock`")
    return locked


def _differing(locked: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys in which two locks differ."""
    one, two = ({key: each[key] for key in _PARTS} for each in (locked, other))
    return differing({**one, "inputs": _by_commit(one["inputs"])}, {**two, "inputs": _by_commit(two["inputs"])})


def _by_commit(content: Any) -> Any:
    """Inputs without the files that a commit decides: which of them were looked at depends on the cache."""
    if not isinstance(content, Mapping):
        return content
    return {key: _by_commit(each) for key, each in content.items() if key != "files" or "commit" not in content}


def _said(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
