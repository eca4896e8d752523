"""A finished merge, told from its merger.json: what it was made of, and where that is now."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.hashes import sha256
from merger.engine.manifest import FORMAT
from merger.errors import CheckpointError
from merger.planning.plan import Plan
from merger.recipe.recipe import Recipe


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a merge; CheckpointError where there is none that this version understands."""
    file = folder / "merger.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: holds no merger.json, so it is no merge; give --base for a fine-tune")
    try:
        record = json.loads(file.read_bytes())
        known = record["format"] == FORMAT and {"recipe", "inputs", "tensors"} <= record.keys()
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise CheckpointError(f"{file}: is no manifest of format {FORMAT}, which merger run writes")
    return dict(record)


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of the whole: by what method, of what, and how many tensors went which way."""
    recipe = record["recipe"]
    how = {key: recipe[key] for key in ("method", "parameters", "pipeline") if key in recipe}
    fates = Counter(
        f"copied from {each['copied from']}" if "copied from" in each else f"merged by {each['merged by']}"
        for each in record["tensors"].values()
    )
    sources = {label: each["source"] for label, each in record["inputs"].items()}
    return {**how, "inputs": sources, "tensors": dict(fates), "seed": record["seed"], "versions": record["versions"]}


def copied(record: Mapping[str, Any]) -> dict[str, str]:
    """Which tensors were copied, and from which model."""
    return {name: each["copied from"] for name, each in record["tensors"].items() if "copied from" in each}


def beside(record: Mapping[str, Any], folder: Path, label: str, inputs: Path | None) -> Recipe:
    """A recipe that reads the merge in ``folder`` as one more expert of its own base, under the name ``label``.

    Local inputs are looked for from the folder ``inputs`` on, or from where the merge's own recipe lay.
    """
    made = record["recipe"]
    start = inputs or _recipe_folder(folder.resolve(), made["output"]["path"])
    sources = {name: _source(name, each, start) for name, each in record["inputs"].items()}
    return Recipe.parse(
        {
            "base": sources.pop("base"),
            "experts": {**sources, label: str(folder.resolve())},
            "method": "linear",
            "rules": [rule for rule in made["rules"] if "use" in rule],
            "missing": made["missing"],
            "extra_rows": made["extra_rows"],
            "output": {"path": "nowhere", "tokenizer": made["output"]["tokenizer"]},
        }
    )


def _source(label: str, said: Mapping[str, Any], start: Path) -> dict[str, str]:
    """An input as a recipe names it."""
    found = {"model": _place(label, said["source"], said.get("commit"), start)}
    if "adapter" in said:
        found["adapter"] = _place(label, said["adapter source"], said["adapter"].get("commit"), start)
    return found


def _place(label: str, source: str, commit: str | None, start: Path) -> str:
    """A folder, or the very commit of a Hub repository that was merged; CheckpointError if there is no such folder."""
    if commit is not None:
        return f"{source.partition('@')[0]}@{commit}"
    path = (start / Path(source).expanduser()).resolve()
    if not path.is_dir():
        raise CheckpointError(f"{label}: there is no folder {path}")
    return str(path)


def _recipe_folder(folder: Path, output: str) -> Path:
    """Where the recipe lay that wrote ``output`` as ``folder``."""
    parts = [part for part in PurePath(output).parts if part != "."]
    if ".." not in parts and folder.parts[-len(parts) :] == tuple(parts):
        return Path(*folder.parts[: -len(parts)])
    return folder.parent


def changed(record: Mapping[str, Any], plan: Plan) -> str | None:
    """What is wrong if an input is no longer the one that was merged, told by the hashes of its files."""
    models = [(label, plan.models[label]) for label in record["inputs"]]
    return next((wrong for label, model in models if (wrong := other_files(record, label, model))), None)


def other_files(record: Mapping[str, Any], label: str, model: Checkpoint) -> str | None:
    """The first file of an input that is not the one that was merged, in a sentence's beginning."""
    said = record["inputs"][label]
    files = {**said["files"], **said.get("adapter", {}).get("files", {})}
    other = (file for file in model.files if files.get(file.name) != sha256(file))
    return next((f"{label}: {file} is not the file that was merged" for file in other), None)


def base(record: Mapping[str, Any], folder: Path, given: str | None) -> dict[str, str]:
    """A merge's base as a recipe names it: where it was when ``folder`` was made of it, or ``given`` in its place."""
    said = record["inputs"]["base"]
    start = _recipe_folder(folder.resolve(), record["recipe"]["output"]["path"])
    if given is None:
        return _source("base", said, start)
    return {**_source("base", {**said, "source": str(start), "commit": None}, start), "model": given}


def expert_name(source: str) -> str:
    """A name for a model that a recipe allows: the last part of its path."""
    last = re.sub(r"@.*$", "", source.rstrip("/")).rpartition("/")[2]
    return unlike(re.sub(r"^[^A-Za-z0-9_]+|[^A-Za-z0-9_.-]", "", last) or "model", ["base"])


def unlike(name: str, taken: Iterable[str]) -> str:
    """The name, lengthened until it is not taken."""
    others = set(taken)
    while name in others:
        name += "_"
    return name
