"""The places of a recipe in words: its elements of lists are counted from 1, and rules are named by what they match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KeyPath = tuple[str | int, ...]

_SINGULAR = {"rules": "rule", "pipeline": "stage", "models": "model", "slices": "slice", "sources": "source"}


def place_name(path: KeyPath, document: Any) -> str:
    """Names a key of a document, as in ``rule 2 (tensors: mlp): parameters.density``."""
    parts: list[str] = []
    keys: list[str] = []
    node = document
    for key in path:
        node = _child(node, key)
        if isinstance(key, int):
            *parents, list_key = keys or [""]
            parts.append(".".join([*parents, element_name(list_key, key, node)]))
            keys = []
        else:
            keys.append(str(key))
    return ": ".join([*parts, *([".".join(keys)] if keys else [])])


def element_name(list_key: str, index: int, element: Any) -> str:
    """Names an element of the list under a key by its number from 1, and a rule by what it matches too."""
    name = f"{_SINGULAR.get(list_key, list_key)} {index + 1}".lstrip()
    return f"{name} ({condition})" if list_key == "rules" and (condition := _condition(element)) else name


def _condition(rule: Any) -> str:
    """What a rule matches, as the recipe writes it; nothing where that is not well-formed."""
    tensors, kinds = (rule.get("tensors"), rule.get("kinds")) if isinstance(rule, Mapping) else (None, None)
    conditions = [f"tensors: {tensors}"] if isinstance(tensors, str) else []
    if isinstance(kinds, list):
        conditions.append(f"kinds: {', '.join(map(str, kinds))}")
    return "; ".join(conditions)


def _child(node: Any, key: str | int) -> Any:
    if isinstance(node, Mapping):
        return node.get(key)
    return node[key] if isinstance(node, list) and isinstance(key, int) and key < len(node) else None
