"""From a manifest to recipes that read the same inputs again, wherever those are now."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.hashes import sha256
from merger.checkpoint.near_paths import missing_path
from merger.engine.manifest import RECORD, Manifest
from merger.errors import CheckpointError
from merger.planning.plan import Plan
from merger.recipe.document import Document
from merger.recipe.recipe import Recipe


def recipe_with_merge(manifest: Manifest, folder: Path, label: str, inputs: Path | None) -> Recipe:
    """A recipe that reads the merge in ``folder`` as one more expert of its own base, under the name ``label``.

    Relative paths of inputs start at the folder ``inputs``, or at the folder of the merge's own recipe.
    """
    recipe = manifest.recipe
    if inputs is not None and not inputs.is_dir():
        raise CheckpointError(missing_path(inputs, "folder", Path.is_dir))
    start = inputs or _start(manifest, folder)
    sources = {name: _source(name, manifest, start) for name in manifest.inputs}
    base, place = sources.pop("base"), str(folder.resolve())
    merge = {**base, "adapter": place} if manifest.is_adapter else place
    return parse_recorded(
        {
            "base": base,
            "experts": {**sources, label: merge},
            "method": "linear",
            "rules": [rule for rule in recipe["rules"] if "use" in rule],
            "missing": recipe["missing"],
            "extra_rows": recipe["extra_rows"],
            **{key: recipe[key] for key in ("tokenizer", "tokens") if key in recipe},
            "output": {"path": "nowhere", "tokenizer": recipe["output"]["tokenizer"]},
        },
        folder,
    )


def parse_recorded(recipe: Mapping[str, Any], folder: Path, start: Path = Path()) -> Recipe:
    """The recipe that the manifest in ``folder`` holds, whose relative paths begin at ``start``.

    RecipeError with the parts of the manifest that are no recipe.
    """
    return Recipe.of(Document(f"{folder / RECORD}: recipe", start.resolve(), dict(recipe)))


def base_source(manifest: Manifest, folder: Path, base: str | None) -> dict[str, Any]:
    """A merge's base as a recipe names it: where it was when ``folder`` was written, or ``base`` in its place."""
    return _source("base", manifest, _start(manifest, folder), base)


def recipe_folder(folder: Path, output: str) -> Path | None:
    """The folder from which the path ``output`` of a recipe leads to ``folder``; None where there is no such folder."""
    parts, real = Path(output).parts, folder.resolve().parts
    if ".." in parts or real[len(real) - len(parts) :] != parts:
        return None
    return Path(*real[: len(real) - len(parts)])


def _start(manifest: Manifest, folder: Path) -> Path:
    """Where the relative paths of a merge's recipe start: its folder, or beside the merge if that was moved."""
    return recipe_folder(folder, str(manifest.recipe["output"]["path"])) or folder.resolve().parent


def _source(label: str, manifest: Manifest, start: Path, model: str | None = None) -> dict[str, Any]:
    """An input as a recipe names it, with its place, or ``model`` in its place."""
    record = manifest.inputs[label]
    source: dict[str, Any] = {"model": model or _place(label, record["source"], record.get("commit"), start)}
    section = manifest.recipe["base"] if label == "base" else manifest.recipe["experts"][label]
    if "rename" in section:
        source["rename"] = section["rename"]
    if "adapter" in record:
        source["adapter"] = _place(label, record["adapter source"], record["adapter"].get("commit"), start)
    return source


def _place(label: str, source: str, commit: str | None, start: Path) -> str:
    """A folder, or the very commit of a Hub repository that was merged; CheckpointError if there is no such folder."""
    if commit is not None:
        return f"{source.partition('@')[0]}@{commit}"
    path = (start / Path(source).expanduser()).resolve()
    if not path.is_dir():
        raise CheckpointError(f"{label}: there is no folder {path}")
    return str(path)


def changed_input(manifest: Manifest, plan: Plan) -> str | None:
    """The beginning of a sentence that names the first input file which is not the one that was merged, if any."""
    changes = (changed_file(manifest, label, plan.models[label]) for label in manifest.inputs)
    return next((change for change in changes if change is not None), None)


def changed_file(manifest: Manifest, label: str, model: Checkpoint) -> str | None:
    """The beginning of a sentence that names the first file of an input which is not the one that was merged."""
    record = manifest.inputs[label]
    hashes = {**record["files"], **record.get("adapter", {}).get("files", {})}
    changed = (file for file in model.files if hashes.get(file.name) != sha256(file))
    return next((f"{label}: {file} is not the file that was merged" for file in changed), None)


def expert_name(source: str) -> str:
    """A name for a model that a recipe allows: the last part of its path."""
    last = re.sub(r"@.*$", "", source.rstrip("/")).rpartition("/")[2]
    return unused_name(re.sub(r"^[^A-Za-z0-9_]+|[^A-Za-z0-9_.-]", "", last) or "model", ["base"])


def unused_name(name: str, used_names: Iterable[str]) -> str:
    """Appends underscores to a name until it is not in ``used_names``."""
    used = set(used_names)
    while name in used:
        name += "_"
    return name
