"""The marks {search: ...} in a recipe, which leave values to `merger search`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from merger.recipe.document import KeyPath


def is_mark(node: Any) -> bool:
    """Whether a value of a recipe is a search mark."""
    return isinstance(node, dict) and set(node) == {"search"}


def marks(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yields the path and the content of each mark in a document; the section ``search`` is no mark."""
    if path and is_mark(node):
        yield path, node["search"]
        return
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        if path or key != "search":
            yield from marks(value, (*path, key))


_VALUES = {"type": "array", "minItems": 1, "description": "The values to try."}
_RANGE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["low", "high"],
    "properties": {
        "low": {"type": "number"},
        "high": {"type": "number"},
        "step": {"type": "number", "exclusiveMinimum": 0, "description": "Only low, low + step, ... are tried."},
        "fine": {"type": "number", "exclusiveMinimum": 0, "description": "The step of the second grid of two-step."},
        "log": {"type": "boolean", "description": "Draw evenly in the logarithm."},
    },
}
MARK: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["search"],
    "properties": {"search": {"anyOf": [_VALUES, _RANGE]}},
    "description": "Left open for `merger search`.",
}
"""The JSON Schema of a mark."""
