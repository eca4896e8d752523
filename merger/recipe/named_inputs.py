"""The inputs that a recipe names, those that are not where it says, and those that its output would replace.

All is read from the document itself: one with other faults names inputs too, so that all of its faults come at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merger.checkpoint.hub import is_cached
from merger.checkpoint.placement import output_fault
from merger.recipe.document import Document, KeyPath
from merger.recipe.locations import FOLDER, STATISTICS, TEXT_FILE, InputKind, location_fault, location_path
from merger.recipe.sections import is_location
from merger.recipe.trajectory import is_trajectory

_GRAMS = ".grams"  # a folder that may be unfinished: its reader tells how to go on
_Input = tuple[KeyPath, Any, InputKind]
"""The key of an input in the document, what stands there, and what is expected there."""


def missing_inputs(
    document: Document, *, with_texts: bool, with_evaluation: bool = False
) -> Iterator[tuple[KeyPath, str]]:
    """Yields the key of each input that is neither here nor on the Hub, with the fault; opens no connection.

    Texts and statistics of calibration count ``with_texts``, held-out examples ``with_evaluation``. What is no location
    at all, and so a fault of another kind, is passed over.
    """
    for path, location, kind in _inputs(document.value, with_texts, with_evaluation):
        if is_location(location) and (fault := input_fault(location, kind, document.folder)):
            yield path, fault


def input_fault(location: str, kind: InputKind, start: Path) -> str | None:
    """The fault of a location; a name that the Hub's cache has is none, whatever lies near it here."""
    fault = location_fault(location, kind, start, least_remote_parts=1)
    is_known = fault is not None and kind is FOLDER and kind.is_remote(location) and is_cached(location)
    return None if is_known else fault


def place_faults(document: Document) -> Iterator[tuple[KeyPath, str]]:
    """Yields the fault of an output that would replace an input, or lie in one; what is no location is passed over."""
    output = dict(_entries(document.value.get("output"))).get("path")
    if is_location(output):
        inputs = [document.folder / location_path(name) for _, name, _ in _models(document.value) if is_location(name)]
        path, folders = document.folder / location_path(output), [folder for folder in inputs if folder.exists()]
        if fault := output_fault(path, folders, force=True):
            yield ("output", "path"), fault


def _inputs(recipe: dict[str, Any], with_texts: bool, with_evaluation: bool) -> Iterator[_Input]:
    yield from _models(recipe)
    calibration = dict(_entries(recipe.get("calibration"))) if with_texts else {}
    yield from _text_inputs(("calibration", "data"), calibration.get("data"))
    for name, location in _entries(calibration.get("stats")):
        if not str(location).endswith(_GRAMS):
            yield ("calibration", "stats", name), location, STATISTICS
    evaluation = dict(_entries(recipe.get("evaluation"))) if with_evaluation else {}
    yield from _text_inputs(("evaluation", "data"), evaluation.get("data"))


def _models(recipe: dict[str, Any]) -> Iterator[_Input]:
    yield from _model_inputs(("base",), recipe.get("base"))
    experts = recipe.get("experts")
    for name, expert in [] if is_trajectory(experts) else _entries(experts):
        yield from _model_inputs(("experts", name), expert)


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """The keys and values of a mapping, the places and values of a list; none of anything else."""
    match value:
        case dict():
            return list(value.items())
        case list():
            return list(enumerate(value))
    return []


def _model_inputs(path: KeyPath, source: Any) -> Iterator[_Input]:
    if not isinstance(source, dict):
        yield path, source, FOLDER
        return
    yield path, source.get("model"), FOLDER
    yield (*path, "adapter"), source.get("adapter"), FOLDER


def _text_inputs(path: KeyPath, data: Any) -> Iterator[_Input]:
    """The files of a text: a location, a source with its own keys, or a list or a map by name of these."""
    if isinstance(data, dict) and isinstance(data.get("file"), str):
        yield (*path, "file"), data["file"], TEXT_FILE
    elif isinstance(data, dict | list):
        for name, text in _entries(data):
            yield from _text_inputs((*path, name), text)
    else:
        yield path, data, TEXT_FILE
