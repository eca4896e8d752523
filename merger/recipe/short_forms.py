"""Short forms of a recipe: experts in a list, or as a pattern of their folders, and an output that is a path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from merger.errors import RecipeError
from merger.recipe.document import Document, KeyPath
from merger.recipe.foreign import foreign_fault
from merger.recipe.sections import unused_expert_name
from merger.recipe.trajectory import with_checkpoints


def spell_out(document: Document) -> Document:
    """The document with the names of its experts and the key of its output's path, where these are unambiguous.

    RecipeError for a configuration of mergekit.
    """
    if fault := foreign_fault(document.label, document.lines.keys()):
        raise RecipeError(fault)
    return _with_output_path(_with_expert_names(with_checkpoints(document)))


def _with_expert_names(document: Document) -> Document:
    experts = document.value.get("experts")
    names = None if not isinstance(experts, list) else _names(experts)
    if not isinstance(experts, list) or not names or len(set(names)) < len(names):
        return document
    value = {**document.value, "experts": dict(zip(names, experts, strict=True))}
    lines = {_with_name(path, names): line for path, line in document.lines.items()}
    return replace(document, value=value, lines=lines)


def _with_name(path: KeyPath, names: Sequence[str]) -> KeyPath:
    """The path of a key below an expert in a list, with the expert's name in place of its number."""
    match path:
        case ("experts", int(i), *keys):
            return ("experts", names[i], *keys)
    return path


def _with_output_path(document: Document) -> Document:
    output = document.value.get("output")
    if not isinstance(output, str):
        return document
    line = document.line(("output",))
    lines = {**document.lines, ("output", "path"): line} if line else document.lines
    return replace(document, value={**document.value, "output": {"path": output}}, lines=lines)


def _names(experts: Sequence[Any]) -> list[str] | None:
    """The name of each expert by its location; None where one of them has no location."""
    locations = [_location(expert) for expert in experts]
    return None if None in locations else [unused_expert_name(location or "", ()) for location in locations]


def _location(expert: Any) -> str | None:
    """The location of an expert's adapter, or else of its model; None if the expert is written in another way."""
    if isinstance(expert, Mapping):
        expert = expert.get("adapter") or expert.get("model")
    return expert if isinstance(expert, str) and expert else None


def experts_by_name(value: Any) -> Any:
    """Experts by name, unchanged; ValueError with an example for a list whose names are ambiguous, or for one value."""
    if isinstance(value, str):
        raise ValueError(f"is {value!r}, expected experts by name or in a list, as in experts: [{value}]")
    if not isinstance(value, list):
        return value
    locations = [location for expert in value if (location := _location(expert)) is not None]
    if len(locations) < len(value) or not locations:
        raise ValueError("expected experts by name, as in experts: {code: models/code, french: models/french}")
    names: list[str] = []
    for location in locations:
        names.append(unused_expert_name(location, names))
    example = ", ".join(f"{name}: {location}" for name, location in zip(names, locations, strict=True))
    raise ValueError(f"the last parts of their folders are alike; give them names, as in experts: {{{example}}}")
