"""The names of experts in a recipe's sections, read from the document itself.

A document with other faults names experts too, so that all of its faults are told at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from merger.errors import nearest
from merger.recipe.document import KeyPath
from merger.recipe.sections import ROW_SOURCES, UNION

Fault = tuple[KeyPath, str]


def reference_faults(recipe: Mapping[str, Any]) -> Iterator[Fault]:
    """Yields the keys that name an expert which the recipe does not have, with the fault.

    Experts that are no mapping are a fault already, and no name can be judged by them. `rules` and the parameters of
    methods are judged with their stages.
    """
    experts = recipe.get("experts", {})
    if not isinstance(experts, Mapping):
        return
    models = ["base", *experts]
    yield from _unknown_models(_tokenizers(recipe), ["base", UNION, *experts])
    yield from _unknown_models(_row_sources(recipe), [*ROW_SOURCES, *experts])
    yield from _unknown_models(_layer_models(recipe), models)
    calibration = _mapping(recipe.get("calibration"))
    for key in ("data", "stats", "samples"):
        for name in _mapping(calibration.get(key)):
            if name not in experts:
                yield ("calibration", key, name), f"there is no such expert; {nearest(str(name), experts)}"


def _unknown_models(references: Iterable[tuple[KeyPath, Any]], models: list[str]) -> Iterator[Fault]:
    """Yields the references that are none of the ``models``; what is no text is a fault of another kind."""
    for path, name in references:
        if isinstance(name, str) and name not in models:
            yield path, f"there is no expert {name!r}; {nearest(name, models)}"


def _tokenizers(recipe: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Any]]:
    if recipe.get("tokenizer") is not None:
        yield ("tokenizer",), recipe["tokenizer"]
    else:
        yield ("output", "tokenizer"), _mapping(recipe.get("output")).get("tokenizer")


def _row_sources(recipe: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Any]]:
    for token, row in _mapping(recipe.get("tokens")).items():
        yield ("tokens", token, "from"), _mapping(row).get("from")


def _layer_models(recipe: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Any]]:
    """Yields the models that entries of `layers` copy, and those whose ranges they name."""
    layers = recipe.get("layers")
    for i, layer in enumerate(layers if isinstance(layers, list) else []):
        entry = _mapping(layer)
        yield ("layers", i, "model"), entry.get("model")
        yield from ((("layers", i, "range", label), label) for label in _mapping(entry.get("range")))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
