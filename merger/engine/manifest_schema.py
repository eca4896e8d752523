"""The parts of merger.json and their types, for the check that every reader of a manifest relies on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


class _Part(BaseModel):
    """Keys and values; keys of later versions are let through."""

    model_config = ConfigDict(strict=True, extra="allow")


def _stored(value: Any) -> Any:
    """How a tensor is stored: BF16 [4096, 4096], or that of each stored tensor of a pack or of a tied name."""
    if not isinstance(value, str) and not _is_text_map(value):
        raise ValueError("expected text, or text by name")
    return value


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


_Size = Annotated[int, Field(ge=0)]


class _Source(_Part):
    model: str
    adapter: str | None


class _Output(_Part):
    path: str
    dtype: str | None
    shard_size: Annotated[int, Field(ge=1)]
    tokenizer: str | None
    form: Literal["model", "adapter"] = "model"


class _Recipe(_Part):
    """What is read of a recipe without merging again; `Recipe` checks the rest where that is done."""

    base: _Source
    experts: dict[str, _Source]
    method: str | None = None
    parameters: dict[str, Any] | None = None
    pipeline: list[Any] | None = None
    rules: list[dict[str, Any]]
    layers: list[dict[str, Any]] = Field(default_factory=list)
    missing: Literal["error", "zero"]
    extra_rows: Literal["keep", "drop"]
    calibration: dict[str, Any] | None
    output: _Output
    seed: int


class _Files(_Part):
    """Files of a model or an adapter by SHA-256, and the commit where they come from the Hub."""

    commit: str | None = None
    files: dict[str, str]


class _Input(_Files):
    source: str
    config: str | None = None
    adapter_source: Annotated[str | None, Field(alias="adapter source")] = None
    adapter: _Files | None = None


class _Result(_Part):
    holds: Literal["weights", "bits", "chosen", "floats", "factors"]
    shared: bool = False
    shape: list[int] = Field(default_factory=list)
    at: str = ""
    count: int = 0


class _Packed(_Part):
    """A tensor of several experts, as `Packed` reads it."""

    by: str
    dtype: str
    shape: list[int]
    rows: _Size
    columns: _Size
    matrices: _Size
    transposed: bool
    results: dict[str, _Result]


class _Tensor(_Part):
    kind: str
    stored_as: Annotated[Any, Field(alias="stored as"), AfterValidator(_stored)]
    merged_by: Annotated[str | None, Field(alias="merged by")] = None
    copied_from: Annotated[str | None, Field(alias="copied from")] = None
    tied_to: Annotated[str | None, Field(alias="tied to")] = None
    packed: _Packed | None = None
    rows: dict[str, list[str]] = Field(default_factory=dict)
    reads: dict[str, str] = Field(default_factory=dict)


class _Manifest(_Part):
    format: int
    versions: dict[str, str]
    seed: int
    device: str
    device_dependent: Annotated[list[str], Field(alias="device-dependent")]
    recipe: _Recipe
    overrides: Annotated[list[str], Field(alias="set", default_factory=list)]
    inputs: dict[str, _Input]
    calibration: dict[str, str | None]
    statistics: dict[str, str]
    shards: dict[str, str]
    files: dict[str, str]
    tensors: dict[str, _Tensor]
    dropped: dict[str, dict[str, str]]  # by model and tensor, the reason
    notes: list[str]


def damage(content: Mapping[str, Any]) -> str | None:
    """A clause that names the parts of a manifest which no merge writes so; None where there are none."""
    try:
        manifest = _Manifest.model_validate(content)
    except ValidationError as error:
        faults = [(detail["type"], ".".join(map(str, detail["loc"]))) for detail in error.errors(include_url=False)]
        missing = [place for kind, place in faults if kind == "missing"]
        return f"lacks {_enumeration(missing)}" if missing else f"{faults[0][1]} is not as a merge writes it"
    place = next(_contradictions(manifest), None)
    return None if place is None else f"{place} is not as a merge writes it"


def _enumeration(places: list[str]) -> str:
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return ", ".join(places[:8]) + more


def _contradictions(manifest: _Manifest) -> Iterator[str]:
    """The parts that name an input, a tensor or a source which the rest of the manifest does not have."""
    recipe, inputs = manifest.recipe, manifest.inputs
    methods = [method for method in (recipe.method, recipe.pipeline) if method is not None]
    if len(methods) > 1 or not (methods or recipe.layers):
        yield "recipe.method"
    if {"base", *recipe.experts} != inputs.keys():
        yield "inputs"
    for label, model in inputs.items():
        if (model.adapter is None) != (model.adapter_source is None):
            yield f"inputs.{label}.adapter"
    for name, tensor in manifest.tensors.items():
        if (tensor.merged_by is None) == (tensor.copied_from is None):
            yield f"tensors.{name}"
        elif tensor.copied_from is not None and tensor.copied_from not in inputs:
            yield f"tensors.{name}.copied from"
        elif tensor.tied_to is not None and tensor.tied_to not in manifest.tensors:
            yield f"tensors.{name}.tied to"
        elif recipe.output.form == "model" and (tensor.packed is None) == _is_of_several(tensor):
            yield f"tensors.{name}.packed"


def _is_of_several(tensor: _Tensor) -> bool:
    """Whether the results of a pack are stored of a tensor, and not the tensor itself or nothing."""
    return isinstance(tensor.stored_as, dict) and bool(tensor.stored_as)
