"""recipe.lock: the resolved inputs and versions of a recipe, and checks against them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping
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
from merger.engine.machine import select_devices
from merger.engine.manifest import (
    RECORD,
    Manifest,
    inexact,
    portable,
    sources_of,
    tensor_records,
    value_differences,
    versions,
)
from merger.engine.output_plan import plan
from merger.errors import CheckpointError, MergerError, RecipeError, nearest, system_reason
from merger.options import Progress, RunOptions, check_options, path_argument
from merger.outputs.verify import whole_merge
from merger.planning.plan import Plan
from merger.recipe.recipe import Recipe, as_recipe

FORMAT = 2  # since 2 with the configs of all inputs, and with the kind of device where it decides the bytes
_PARTS = ("versions", "device", "recipe", "inputs", "calibration", "files", "tensors")


def lock(recipe: Recipe | str | Path, path: str | Path, options: RunOptions = RunOptions()) -> dict[str, Any]:
    """Writes the resolved recipe to ``path``: all defaults, inputs by commit and SHA-256, versions.

    ``recipe`` may be the path of its file, here and below. Only configs and headers of a Hub repository are fetched. An
    existing file is replaced only if it is a lock.
    """
    check_options(options)
    target = path_argument("path", path)
    check_replaceable(target, is_ours=_is_lock)
    content = _lock_content(as_recipe(recipe), options)
    replace_bytes(target, json_bytes(content))
    return content


def lock_of(recipe: str | Path) -> Path:
    """Returns the path of a recipe's lock: recipe.lock beside recipe.yaml."""
    path = Path(recipe).with_suffix(".lock")
    if path == Path(recipe):
        raise RecipeError(f"{recipe}: is named as its own lock would be; name it {path.stem}.yaml")
    return path


def check_lock(
    recipe: Recipe | str | Path,
    path: str | Path,
    options: RunOptions = RunOptions(),
    *,
    allow_versions: Collection[str] = (),
) -> list[str]:
    """Raises RecipeError with all differences between the resolved recipe and the lock at ``path``.

    Returns those in the versions of the packages ``allow_versions``, which are no faults.
    """
    locked, current = _read(Path(path)), _lock_content(as_recipe(recipe), options)
    for name in allow_versions:
        if name not in (names := {**locked["versions"], **current["versions"]}):
            raise RecipeError(f"allow_versions='{name}': is no package of {path}; {nearest(name, names)}")
    sentences = {
        key: f"{path}: {key} was {_render_value(old)} when it was locked, and is {_render_value(new)}"
        for key, (old, new) in _lock_differences(locked, current).items()
    }
    allowed_keys = _version_keys(allow_versions)
    faults = [sentence for key, sentence in sentences.items() if key not in allowed_keys]
    if faults:
        raise RecipeError([*faults, f"{path}: lock the recipe again if that is meant"])
    return [f"{sentence}, as allowed" for sentence in sentences.values()]


def _version_keys(names: Collection[str]) -> set[str]:
    return {f"versions.{name}" for name in names}


def is_done(
    recipe: Recipe | str | Path,
    path: str | Path,
    options: RunOptions = RunOptions(),
    *,
    trust_mtime: bool = False,
    allow_versions: Collection[str] = (),
) -> bool:
    """Whether the output exists, is complete, and was made from the locked inputs at ``path``: one pass of hashing.

    With ``trust_mtime`` a shard with unchanged size and modification time is not hashed again; only headers are read.
    """
    recipe = as_recipe(recipe)
    output = recipe.folder / Path(recipe.output.path).expanduser()
    try:
        manifest = Manifest.read(output)
    except CheckpointError as error:
        if (output / RECORD).exists():
            options.notice(f"{error}, so the output is not taken for finished")
        return False
    device = manifest.content["device"] if manifest.content["device-dependent"] else None
    content = {**{key: manifest.content[key] for key in _PARTS}, "tensors": _hash(manifest.tensors), "device": device}
    if _lock_differences(_read(Path(path)), content).keys() - _version_keys(allow_versions):
        return False
    try:
        whole_merge(output)
    except MergerError:
        return False
    shards = {output / file: str(sha) for file, sha in manifest.shards.items()}
    unread = {file: sha for file, sha in shards.items() if not (trust_mtime and noted(file) == sha)}
    return _hashes_match(unread, options.progress)


def _hashes_match(shards: Mapping[Path, str], tell: Progress) -> bool:
    """Whether all files have their SHA-256 in ``shards``; notes each matching file."""
    total, progress, lock = sum(file.stat().st_size for file in shards), Counter[str](), Lock()

    def count(size: int) -> None:
        with lock:
            progress["bytes"] += size
            tell("verifying", progress["bytes"], total)

    def has(file: Path) -> bool:
        is_equal = digest(file, count) == shards[file]
        if is_equal:
            note(file, shards[file])
        return is_equal

    try:
        with ThreadPoolExecutor(4, "merger-verify") as pool:
            return all(list(pool.map(has, shards)))
    except OSError:
        return False  # an unreadable output is not done


# --- content --------------------------------------------------------------------------------------


def _lock_content(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Returns the parts of merger.json that are known before the merge; the device only if bytes depend on it."""
    merge_plan = plan(recipe, offline=options.offline, trust_remote_code=options.trust_remote_code)
    with closing(merge_plan):
        device = select_devices(options.device)[0].partition(":")[0] if inexact(merge_plan) else None
        content = {
            "format": FORMAT,
            "versions": versions(merge_plan),
            "device": device,
            "recipe": portable(recipe.spelled_out()),
            "inputs": {label: _input(merge_plan, label, offline=options.offline) for label in merge_plan.models},
            "calibration": origins(merge_plan),
            "files": _files(merge_plan),
            "tensors": _hash(tensor_records(merge_plan)),
        }
    unknown = [name for name, sha in origins(merge_plan).items() if sha is None]
    if unknown:
        raise RecipeError(f"calibration: {', '.join(unknown)} is no file here, and may change; save it to lock it")
    resolved: dict[str, Any] = json.loads(json.dumps(content))
    return resolved


def _input(merge_plan: Plan, label: str, *, offline: bool) -> dict[str, Any]:
    source = {"base": merge_plan.recipe.base, **merge_plan.recipe.experts}[label]
    model = merge_plan.models[label]
    adapter = model.adapter
    adapter_files = [file for file in model.files if adapter is not None and file.parent == adapter.directory]
    model_files = [file for file in model.files if file not in adapter_files]
    record = {**sources_of(source), **_content(model, source.model, model_files, label, offline=offline)}
    record["config"] = config_digest(model)
    if adapter is None or source.adapter is None:
        return record
    return {**record, "adapter": _content(adapter, source.adapter, adapter_files, label, offline=offline)}


def _content(model: Checkpoint, source: str, files: list[Path], label: str, *, offline: bool) -> dict[str, Any]:
    if model.commit is None:
        return {"files": {file.name: sha256(file) for file in files}}
    hashes = {file.name: sha256(file) for file in files} if offline else hub.weight_hashes(source, model.commit, label)
    return {"commit": model.commit, "files": hashes}


def _files(merge_plan: Plan) -> dict[str, str]:
    """Returns the SHA-256 of each side file of the output."""
    contents = {name: side_files.side_file_content(source) for name, source in merge_plan.side_files.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- differences ----------------------------------------------------------------------------------


def _is_lock(path: Path) -> bool:
    """Whether a file is a lock of any version of merger."""
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
    except (ValueError, RecursionError) as error:
        damage: str | None = f"is not valid JSON: {error}"
    else:
        damage = _damage(locked)
    if damage is not None:
        raise RecipeError(f"{path}: {damage}; make it again with `merger lock`")
    return dict(locked)


def _damage(locked: Any) -> str | None:
    """Why the content of a file is no lock that this version reads; None if it is one."""
    if not isinstance(locked, dict) or "format" not in locked:
        return "is no lock of merger"
    if locked["format"] != FORMAT:
        return f"is of format {locked['format']}, and this version reads {FORMAT}"
    missing = [key for key in _PARTS if key not in locked]
    return f"is damaged: it has no {' and no '.join(missing)}" if missing else None


def _lock_differences(locked: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the keys in which two locks differ, with both values."""
    locked_parts, current_parts = ({key: parts[key] for key in _PARTS} for parts in (locked, current))
    return value_differences(
        {**locked_parts, "inputs": _by_commit(locked_parts["inputs"])},
        {**current_parts, "inputs": _by_commit(current_parts["inputs"])},
    )


def _by_commit(content: Any) -> Any:
    """Removes files from inputs with a commit: which of these files were hashed depends on the cache."""
    if not isinstance(content, Mapping):
        return content
    return {key: _by_commit(value) for key, value in content.items() if key != "files" or "commit" not in content}


def _render_value(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
