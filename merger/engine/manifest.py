"""merger.json: from what a model was made, and what happened to every tensor; nothing of the machine or the hour."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._version import VERSION
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.hashes import stamp
from merger.recipe.recipe import portable_location

if TYPE_CHECKING:
    from merger.checkpoint.checkpoint import Checkpoint
    from merger.checkpoint.tensor_info import Info
    from merger.planning.plan import Plan, TensorPlan
    from merger.recipe.recipe import Source

RECORD = "merger.json"


def record_of(
    plan: Plan,
    device: str,
    hashes: Mapping[Path, Future[str]],
    shards: Mapping[str, str],
    files: Mapping[str, str],
    calibration: Mapping[str, str | None],
    statistics: Mapping[str, str],
    notes: Iterable[str],
) -> dict[str, Any]:
    """The manifest of a finished merge, given the SHA-256 of each input, output shard, side and statistics file."""
    return {
        "format": FORMAT,
        "versions": versions(),
        "seed": plan.recipe.seed,
        "device": device.partition(":")[0],
        "device-dependent": inexact(plan),
        "recipe": portable(plan.recipe.spelled_out()),
        "set": list(plan.recipe.overrides),
        "inputs": inputs_of(plan, {file: hashed.result() for file, hashed in hashes.items()}),
        "calibration": dict(calibration),
        "statistics": dict(statistics),
        "shards": dict(shards),
        "files": dict(files),
        "tensors": fates(plan),
        "dropped": {label: names for label, names in plan.dropped.items() if names},
        "notes": sorted(notes),
    }


def decisive(plan: Plan, device: str, statistics: Mapping[str, str | None]) -> dict[str, str]:
    """What decides the bytes of the shards, part by part, as hashes; from headers alone, so inputs by their stamps."""
    recipe = portable(plan.recipe.spelled_out())
    parts = {
        "recipe": {**recipe, "output": {**recipe["output"], "path": None}},
        "inputs": {label: {str(file): stamp(file) for file in model.files} for label, model in plan.models.items()},
        "tensors": fates(plan),
        "statistics": dict(statistics),
        "versions": versions(),
        "device": device.partition(":")[0],
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


def inputs_of(plan: Plan, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """From what commit and which bytes every model came, given the SHA-256 of each input file."""
    sources = {"base": plan.recipe.base, **plan.recipe.experts}
    return {
        label: {
            **sources_of(source),
            **_origin(plan.models[label], hashes),
        }
        for label, source in sources.items()
    }


def _origin(model: Checkpoint, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """From what commit and which bytes a model, and an adapter on it, came."""
    adapter = model.adapter
    on_top = [file for file in model.files if adapter is not None and file.parent == adapter.directory]
    own = _named(model.commit, [file for file in model.files if file not in on_top], hashes)
    return own if adapter is None else {**own, "adapter": _named(adapter.commit, on_top, hashes)}


def _named(commit: str | None, files: Iterable[Path], hashes: Mapping[Path, str]) -> dict[str, Any]:
    said = {"files": {file.name: hashes[file] for file in files}}
    return {"commit": commit, **said} if commit else said


def sources_of(source: Source) -> dict[str, str]:
    """What a recipe calls a model and the adapter on it."""
    on_top = {"adapter source": portable_location(source.adapter)} if source.adapter else {}
    return {"source": portable_location(source.model), **on_top}


def fates(plan: Plan) -> dict[str, Any]:
    """What happens to every tensor."""
    return {tensor.name: _fate(tensor) for tensor in plan.tensors}


def _fate(tensor: TensorPlan) -> dict[str, Any]:
    """What happened to one tensor, for the manifest."""
    by = "recipe" if tensor.group == 0 else f"rule {tensor.group}"
    said: dict[str, Any] = {"kind": tensor.kind, "stored as": stored_as(tensor.info)}
    said |= {"merged by": by} if tensor.stages else {"copied from": tensor.source}
    if tensor.packed is not None:
        stored = {name: stored_as(info) for name, info in tensor.packed.infos.items()}
        said |= {"packed": tensor.packed.recorded(), "stored as": stored}
    if tensor.tied_to is not None:
        return said | {"tied to": tensor.tied_to} | ({} if tensor.stored else {"stored as": {}})
    others = {label: name for label, name in tensor.reads.items() if name != tensor.name}
    return said | ({"reads": others} if others else {})


def stored_tensors(fates: Mapping[str, Any]) -> dict[str, Any]:
    """How each tensor in the files is stored, by the manifest's ``fates``; a pack stores several of one."""
    found: dict[str, Any] = {}
    for name, said in fates.items():
        stored = said.get("stored as") if isinstance(said, dict) else None
        found |= stored if isinstance(stored, dict) else {name: stored}
    return found


def inexact(plan: Plan) -> list[str]:
    """The stages whose last bits another device may give otherwise, for they sum floats or decompose matrices."""
    return sorted({stage.entry.name for tensor in plan.tensors for stage in tensor.stages if not stage.entry.exact})


def stored_as(info: Info) -> str:
    """BF16 [4096, 4096]: what a tensor's header says, in the manifest's words."""
    return f"{info.dtype} {list(info.shape)}"


def portable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the machine's folders."""

    def without(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: without(each) for key, each in value.items()}
        return portable_location(value) if isinstance(value, str) else value

    def source(each: Mapping[str, Any]) -> dict[str, Any]:
        return {key: without(value) if key in ("model", "adapter") else value for key, value in each.items()}

    experts = {name: source(each) for name, each in recipe["experts"].items()}
    given = recipe["calibration"]
    calibration = given and {**given, "data": without(given["data"]), "stats": without(given["stats"])}
    output = {**recipe["output"], "path": portable_location(recipe["output"]["path"])}
    return {**recipe, "base": source(recipe["base"]), "experts": experts, "calibration": calibration, "output": output}


def differing(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """The keys, as in experts.math.weight, whose values differ between two plain objects; both values of each."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return {} if one == other else {"": (one, other)}
    keys = dict.fromkeys((*one, *other))
    found = ((key, differing(one.get(key), other.get(key))) for key in keys)
    return {f"{key}.{rest}" if rest else key: pair for key, each in found for rest, pair in each.items()}


def is_packed(record: Mapping[str, Any]) -> bool:
    """Whether a manifest is that of several experts."""
    return any("packed" in said for said in record["tensors"].values())


FORMAT = 1


def versions() -> dict[str, str]:
    """The versions that decide the bytes."""
    return {
        "merger": VERSION,
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }
