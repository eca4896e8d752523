"""mergekit's references to models: ``model@revision+adapter@revision``, or the same as keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from merger.recipe.document import KeyPath
from merger.recipe.sections import unused_expert_name

Faults = list[tuple[KeyPath, str]]


@dataclass(frozen=True)
class Reference:
    """A model, and an adapter on top of it; each a folder or a repository with an optional @revision."""

    model: str
    adapter: str | None = None

    @property
    def written(self) -> Any:
        """The reference as a recipe writes it."""
        return self.model if self.adapter is None else {"model": self.model, "adapter": self.adapter}


def reference(value: Any, path: KeyPath, faults: Faults) -> Reference | None:
    """Parses a reference; for an invalid one, appends to ``faults`` and returns None."""
    if isinstance(value, str):
        model, *adapters = value.split("+")
        if model and len(adapters) <= 1 and all(adapters):
            return Reference(model, adapters[0] if adapters else None)
        faults.append((path, f"is {value!r}, expected a model or model+adapter"))
        return None
    if not isinstance(value, Mapping) or "model" not in value:
        faults.append((path, "expected a model: a folder or org/name, with @revision or +adapter where there is one"))
        return None
    if value.get("override_architecture") is not None:
        faults.append(((*path, "override_architecture"), "has no equivalent: what a tensor is, is told from the model"))
    model_path = _location(value["model"], (*path, "model"), faults)
    adapter = None if value.get("lora") is None else _location(value["lora"], (*path, "lora"), faults)
    return None if model_path is None else Reference(model_path, adapter)


def _location(value: Any, path: KeyPath, faults: Faults) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        revision = value.get("revision")
        return value["path"] if revision is None else f"{value['path']}@{revision}"
    faults.append((path, "expected a folder or org/name, or {path: ..., revision: ...}"))
    return None


def expert_names(references: Iterable[Reference]) -> dict[Reference, str]:
    """Returns a short name for each reference: the name of its folder or repository, numbered if it is not unique."""
    names: dict[Reference, str] = {}
    for reference in references:
        names[reference] = unused_expert_name(reference.adapter or reference.model, names.values())
    return names
