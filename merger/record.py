"""merger.json: from what a model was made, and what happened to every tensor; nothing of the machine or the hour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.checkpoint import manifest

if TYPE_CHECKING:
    from merger.checkpoint.stored import Checkpoint
    from merger.planning import Plan, TensorPlan


def record_of(
    plan: Plan,
    device: str,
    hashes: Mapping[Path, Future[str]],
    shards: Mapping[str, str],
    statistics: Mapping[str, str],
    notes: Iterable[str],
) -> dict[str, Any]:
    """The manifest of a finished merge, given the SHA-256 of each input file, output shard and statistics file."""
    sources = {"base": plan.recipe.base, **plan.recipe.experts}
    return {
        "format": manifest.FORMAT,
        "versions": manifest.versions(),
        "seed": plan.recipe.seed,
        "device": device.partition(":")[0],
        "recipe": _portable(plan.recipe.spelled_out()),
        "set": list(plan.recipe.overrides),
        "inputs": {
            label: {
                "source": manifest.portable(source.model),
                **({"adapter source": manifest.portable(source.adapter)} if source.adapter else {}),
                **_origin(plan.models[label], hashes),
            }
            for label, source in sources.items()
        },
        "statistics": dict(statistics),
        "shards": dict(shards),
        "tensors": {tensor.name: _fate(tensor) for tensor in plan.tensors},
        "dropped": {label: names for label, names in plan.dropped.items() if names},
        "notes": sorted(notes),
    }


def _origin(model: Checkpoint, hashes: Mapping[Path, Future[str]]) -> dict[str, Any]:
    """From what commit and which bytes a model, and an adapter on it, came."""
    adapter = model.adapter
    on_top = [file for file in model.files if adapter is not None and file.parent == adapter.directory]
    own = _named(model.commit, [file for file in model.files if file not in on_top], hashes)
    return own if adapter is None else {**own, "adapter": _named(adapter.commit, on_top, hashes)}


def _named(commit: str | None, files: Iterable[Path], hashes: Mapping[Path, Future[str]]) -> dict[str, Any]:
    said = {"files": {file.name: hashes[file].result() for file in files}}
    return {"commit": commit, **said} if commit else said


def _fate(tensor: TensorPlan) -> dict[str, Any]:
    """What happened to one tensor, for the manifest."""
    by = "recipe" if tensor.group == 0 else f"rule {tensor.group}"
    said: dict[str, Any] = {"kind": tensor.kind}
    said |= {"merged by": by} if tensor.stages else {"copied from": tensor.source}
    if tensor.tied_to is not None:
        return said | {"tied to": tensor.tied_to}
    others = {label: name for label, name in tensor.reads.items() if name != tensor.name}
    return said | ({"reads": others} if others else {})


def _portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the machine's folders."""

    def source(each: dict[str, Any]) -> dict[str, Any]:
        return {key: manifest.portable(v) if key in ("model", "adapter") and v else v for key, v in each.items()}

    experts = {name: source(each) for name, each in recipe["experts"].items()}
    output = {**recipe["output"], "path": manifest.portable(recipe["output"]["path"])}
    return {**recipe, "base": source(recipe["base"]), "experts": experts, "output": output}
