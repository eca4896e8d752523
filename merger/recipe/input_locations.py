"""The check that the inputs which a recipe names are on this machine or may be on the Hub, before any is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from merger.checkpoint.hub import is_cached
from merger.errors import CheckpointError
from merger.recipe.calibration_faults import is_calibrated
from merger.recipe.document import KeyPath
from merger.recipe.locations import FOLDER, STATISTICS, TEXT_FILE, InputKind, location_fault
from merger.recipe.recipe import Recipe
from merger.recipe.sections import Source, TextData, TextDataOfAll, TextSource

_GRAMS = ".grams"  # a folder that may be unfinished: its reader tells how to go on
_Input = tuple[KeyPath, str, InputKind]
"""The key of an input in the recipe, its location, and what is expected there."""


def check_inputs(
    *recipes: Recipe,
    with_texts: bool = True,
    with_evaluation: bool = False,
    examples: Mapping[str, str] | None = None,
) -> None:
    """Raises CheckpointError with all locations that lead nowhere, each with its line and key; opens no connection.

    Texts and statistics of a recipe count ``with_texts`` where a stage takes them, held-out examples
    ``with_evaluation`` alone. ``examples`` are further ones by task, relative to the working folder.
    """
    faults = [
        recipe.fault(path, fault)
        for recipe in recipes
        for path, location, kind in _inputs(recipe, with_texts, with_evaluation)
        if (fault := _fault(location, kind, recipe.folder))
    ]
    _refuse([*faults, *_argument_faults(examples or {}, TEXT_FILE)])


def check_models(models: Mapping[str, str]) -> None:
    """Raises CheckpointError with all of the ``models``, by the arguments that name them, that lead nowhere."""
    _refuse(_argument_faults(models, FOLDER))


def _argument_faults(arguments: Mapping[str, str], kind: InputKind) -> list[str]:
    return [f"{name}: {fault}" for name, location in arguments.items() if (fault := _fault(location, kind, Path()))]


def _refuse(faults: list[str]) -> None:
    if faults:
        raise CheckpointError("\n".join(dict.fromkeys(faults)))


def _fault(location: str, kind: InputKind, start: Path) -> str | None:
    """The fault of a location; a name that the Hub's cache has is none, whatever lies near it here."""
    fault = location_fault(location, kind, start, least_remote_parts=1)
    is_known = fault is not None and kind is FOLDER and kind.is_remote(location) and is_cached(location)
    return None if is_known else fault


def _inputs(recipe: Recipe, with_texts: bool, with_evaluation: bool) -> Iterator[_Input]:
    yield from _model_inputs(("base",), recipe.base)
    for name, expert in recipe.experts.items():
        yield from _model_inputs(("experts", name), expert)
    if with_texts and recipe.calibration is not None and is_calibrated(recipe):
        yield from _text_inputs(("calibration", "data"), recipe.calibration.data)
        for name, location in recipe.calibration.stats.items():
            if not location.endswith(_GRAMS):
                yield ("calibration", "stats", name), location, STATISTICS
    if recipe.evaluation is not None and with_evaluation:
        yield from _text_inputs(("evaluation", "data"), recipe.evaluation.data)


def _model_inputs(path: KeyPath, source: Source) -> Iterator[_Input]:
    yield path, source.model, FOLDER
    if source.adapter is not None:
        yield (*path, "adapter"), source.adapter, FOLDER


def _text_inputs(path: KeyPath, data: TextDataOfAll | TextData | None) -> Iterator[_Input]:
    match data:
        case None:
            return
        case dict():
            for name, texts in data.items():
                yield from _text_inputs((*path, name), texts)
        case list():
            for i, text in enumerate(data):
                yield from _text_inputs((*path, i), text)
        case str():
            yield path, data, TEXT_FILE
        case TextSource():
            yield (*path, "file"), data.file, TEXT_FILE
