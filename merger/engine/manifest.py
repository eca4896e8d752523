"""merger.json: the inputs of a merge and the operation on every tensor, without machine or time."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._version import VERSION
from merger.checkpoint.adapter_config import CONFIG
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.files import write_json
from merger.checkpoint.hashes import config_digest, stamp
from merger.checkpoint.near_paths import missing_path
from merger.engine.manifest_schema import damage
from merger.errors import CheckpointError, system_reason
from merger.pipeline.stages import entries_of
from merger.recipe.recipe import Recipe, portable_location

if TYPE_CHECKING:
    from merger.checkpoint.tensor_info import Info
    from merger.planning.plan import Plan, TensorPlan
    from merger.planning.row_map import RowMap
    from merger.recipe.sections import Source

RECORD = "merger.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The content of merger.json, which is written by a merge and read by all that is done with one."""

    content: Mapping[str, Any]

    @classmethod
    def of_merge(
        cls,
        plan: Plan,
        device: str,
        *,
        inputs: Mapping[Path, Future[str]],
        shards: Mapping[str, str],
        files: Mapping[str, str],
        calibration: Mapping[str, str | None],
        statistics: Mapping[str, str],
        notes: Iterable[str],
    ) -> Manifest:
        """The manifest of a finished merge, given the SHA-256 of each input, output shard, side and statistics file."""
        return cls(
            {
                "format": FORMAT,
                "versions": versions(plan),
                "seed": plan.recipe.seed,
                "device": device.partition(":")[0],
                "device-dependent": inexact(plan),
                "recipe": portable(plan.recipe.spelled_out()),
                "set": list(plan.recipe.overrides),
                "inputs": inputs_of(plan, {file: hashed.result() for file, hashed in inputs.items()}),
                "calibration": dict(calibration),
                "statistics": dict(statistics),
                "shards": dict(shards),
                "files": dict(sorted(files.items())),
                "tensors": tensor_records(plan),
                "dropped": {label: names for label, names in plan.dropped.items() if names},
                "notes": sorted(notes),
            }
        )

    @classmethod
    def parse(cls, text: bytes) -> Manifest:
        """Parses a manifest; raises ValueError with a reason that follows the file's name in a message."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"cannot be read: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"is not of format {FORMAT}, the only one that this version reads; merge again")
        faults = damage(content)
        if faults is not None:
            raise ValueError(f"{faults}; merge again")
        return cls(content)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a finished merge; CheckpointError where ``folder`` has none that can be understood."""
        file = folder / RECORD
        if not folder.exists():
            raise CheckpointError(missing_path(folder, "folder", Path.is_dir))
        try:
            return cls.parse(file.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: has no {RECORD}, so it is no finished merge") from None
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {system_reason(error)}") from None
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from None

    def write(self, folder: Path) -> None:
        """Writes merger.json into a folder."""
        write_json(folder / RECORD, self.content)

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe with its defaults, without the machine's folders."""
        return dict(self.content["recipe"])

    @property
    def experts(self) -> list[str]:
        """The names of the experts."""
        return list(self.content["recipe"]["experts"])

    @property
    def inputs(self) -> dict[str, Any]:
        """The source, the commit and the SHA-256s of the files of base and experts."""
        return dict(self.content["inputs"])

    @property
    def tensors(self) -> dict[str, Any]:
        """The record of every tensor."""
        return dict(self.content["tensors"])

    @property
    def shards(self) -> dict[str, str]:
        """The SHA-256 of each weight file."""
        return dict(self.content["shards"])

    @property
    def files(self) -> dict[str, str]:
        """The SHA-256 of each file beside the weights."""
        return dict(self.content["files"])

    @property
    def is_packed(self) -> bool:
        """Whether the output holds several experts."""
        return any("packed" in record for record in self.tensors.values())

    @property
    def is_adapter(self) -> bool:
        """Whether the output is an adapter for the base."""
        return bool(self.recipe["output"].get("form") == "adapter")

    @property
    def copied(self) -> dict[str, str]:
        """The model that each copied tensor comes from, by tensor."""
        return {name: record["copied from"] for name, record in self.tensors.items() if "copied from" in record}

    @property
    def stored_tensors(self) -> dict[str, Any]:
        """How each tensor in the weight files is stored, in the words of `stored_as`; a pack stores several of one."""
        tensors: dict[str, Any] = {}
        for name, record in self.tensors.items():
            stored = record["stored as"]
            tensors |= stored if isinstance(stored, dict) else {name: stored}
        return tensors

    def summary(self) -> dict[str, Any]:
        """The method, the inputs, the seed, the versions, and how many tensors were merged and copied."""
        method: dict[str, Any] = {
            key: self.recipe[key] for key in ("method", "parameters", "pipeline") if key in self.recipe
        }
        tensors = Counter(
            f"copied from {record['copied from']}" if "copied from" in record else f"merged by {record['merged by']}"
            for record in self.tensors.values()
        )
        return {
            **method,
            "inputs": {label: record["source"] for label, record in self.inputs.items()},
            "tensors": dict(tensors),
            "seed": self.content["seed"],
            "versions": self.content["versions"],
        }


def decisive(plan: Plan, device: str, statistics: Mapping[str, str | None]) -> dict[str, str]:
    """Returns hashes of the parts that decide the shards' bytes, from headers alone: inputs count by their stamps."""
    recipe = portable(plan.recipe.spelled_out())
    parts = {
        "recipe": {**recipe, "output": {**recipe["output"], "path": None}},
        "inputs": {label: _stamps(model) for label, model in plan.models.items()},
        "tensors": tensor_records(plan),
        "statistics": dict(statistics),
        "versions": versions(plan),
        "device": device.partition(":")[0],
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


def _stamps(model: Checkpoint) -> dict[str, str]:
    """Returns marks that change with a model, without reading weights: the stamps of its files, and its config."""
    return {**{str(file): stamp(file) for file in model.files}, "config": config_digest(model)}


def inputs_of(plan: Plan, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """Returns the commit and the file hashes of every model, from the SHA-256 of each input file."""
    sources = {"base": plan.recipe.base, **plan.recipe.experts}
    return {
        label: {
            **sources_of(source),
            **_origin(plan.models[label], hashes),
            "config": config_digest(plan.models[label]),
        }
        for label, source in sources.items()
    }


def _origin(model: Checkpoint, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """Returns the commit and the file hashes of a model, and of an adapter on it."""
    adapter = model.adapter
    adapter_files = [
        file for file in model.files if adapter is not None and (file in adapter.files or file.name == CONFIG)
    ]
    origin = _file_hashes(model.commit, [file for file in model.files if file not in adapter_files], hashes)
    return origin if adapter is None else {**origin, "adapter": _file_hashes(adapter.commit, adapter_files, hashes)}


def _file_hashes(commit: str | None, files: Iterable[Path], hashes: Mapping[Path, str]) -> dict[str, Any]:
    """The SHA-256 of each file, and the commit if the files come from the Hub."""
    record = {"files": {file.name: hashes[file] for file in files}}
    return {"commit": commit, **record} if commit else record


def sources_of(source: Source) -> dict[str, str]:
    """The names of a model and of the adapter on it, as the recipe writes them."""
    adapter = {"adapter source": portable_location(source.adapter)} if source.adapter else {}
    return {"source": portable_location(source.model), **adapter}


def tensor_records(plan: Plan) -> dict[str, Any]:
    """Returns the manifest's record of every tensor."""
    return {tensor.name: _tensor_record(tensor) for tensor in plan.tensors}


def _tensor_record(tensor: TensorPlan) -> dict[str, Any]:
    """Returns the manifest's record of one tensor."""
    record: dict[str, Any] = {"kind": tensor.kind, "stored as": stored_as(tensor.info)}
    record |= {"merged by": tensor.choice} if tensor.stages else {"copied from": tensor.source}
    record |= {"scale": tensor.scale} if tensor.scale != 1 else {}
    if tensor.factors is not None:
        record["stored as"] = {name: stored_as(info) for name, info in tensor.factors.items()}
    if tensor.packed is not None:
        stored = {name: stored_as(info) for name, info in tensor.packed.infos.items()}
        record |= {"packed": tensor.packed.as_record(), "stored as": stored}
    if tensor.tied_to is not None:
        return record | {"tied to": tensor.tied_to} | ({} if tensor.stored else {"stored as": {}})
    if tensor.extra:
        record["rows"] = {f"{rows.start} to {rows.stop - 1}": list(rows.models) for rows in tensor.extra}
    if maps := {label: row_map for label, row_map in tensor.row_maps.items() if _decides(tensor, row_map)}:
        record["row maps"] = {label: _row_map_record(row_map) for label, row_map in maps.items()}
    renamed = {label: name for label, name in tensor.reads.items() if name != tensor.name}
    return record | ({"reads": renamed} if renamed else {})


def _decides(tensor: TensorPlan, row_map: RowMap) -> bool:
    """Whether a row map decides more than the rows that are not merged, which have their record."""
    gaps = row_map.gaps(0, tensor.info.shape[0])
    return row_map.moves_rows or any(any(tensor.merged_rows(gap.start, gap.stop)) for gap in gaps)


def _row_map_record(row_map: RowMap) -> str:
    """A row map as the manifest names it: it is as long as a vocabulary, so by its SHA-256."""
    return hashlib.sha256(json.dumps(row_map.runs).encode()).hexdigest()


def inexact(plan: Plan) -> list[str]:
    """The stages and scores whose result another device may give otherwise.

    They sum floats or decompose matrices, or look at inputs from forward passes of this merge.
    """
    stages = (part for tensor in plan.tensors for stage in tensor.stages for part in stage.parts)
    return sorted({part.entry.name for part in stages if not part.entry.exact or (plan.runs_models and part.arguments)})


def stored_as(info: Info) -> str:
    """Returns a tensor's dtype and shape as the manifest writes them, such as BF16 [4096, 4096]."""
    return f"{info.dtype} {list(info.shape)}"


def portable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without the machine's folders."""

    def locations(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: locations(location) for key, location in value.items()}
        if isinstance(value, list):
            return [locations(location) for location in value]
        return portable_location(value) if isinstance(value, str) else value

    def source(model: Mapping[str, Any]) -> dict[str, Any]:
        return {key: locations(value) if key in ("model", "adapter") else value for key, value in model.items()}

    experts = {name: source(expert) for name, expert in recipe["experts"].items()}
    section = recipe["calibration"]
    calibration = section and {**section, "data": locations(section["data"]), "stats": locations(section["stats"])}
    output = {**recipe["output"], "path": portable_location(recipe["output"]["path"])}
    return {**recipe, "base": source(recipe["base"]), "experts": experts, "calibration": calibration, "output": output}


def value_differences(recorded: Any, current: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the keys, such as experts.math.weight, whose values differ between two objects, with both values."""
    if not isinstance(recorded, Mapping) or not isinstance(current, Mapping):
        return {} if recorded == current else {"": (recorded, current)}
    keys = dict.fromkeys((*recorded, *current))
    differences = ((key, value_differences(recorded.get(key), current.get(key))) for key in keys)
    return {
        f"{key}.{subkey}" if subkey else key: pair for key, nested in differences for subkey, pair in nested.items()
    }


def versions(plan: Plan) -> dict[str, str]:
    """The versions that decide the bytes of a merge; that of transformers where models are run for it."""
    run = {"transformers": version("transformers")} if plan.runs_models else {}
    return {**merge_versions(), **run, **method_versions(plan.recipe)}


def method_versions(recipe: Recipe) -> dict[str, str]:
    """The versions of the installed packages, other than merger, that the methods of a recipe come from."""
    stages = [stage for choice in recipe.choices().values() for stage in choice.stages]
    packages = {entry.package for stage in stages for entry in entries_of(stage, tuple(recipe.experts))}
    return dict(sorted(package for package in packages if package is not None))


def merge_versions() -> dict[str, str]:
    """The versions that decide the bytes of every merge."""
    return {
        "merger": VERSION,
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
    }
