"""The check that the inputs which a recipe names are on this machine or may be on the Hub, before any is opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merger.errors import CheckpointError
from merger.recipe.locations import FOLDER, TEXT_FILE, InputKind
from merger.recipe.named_inputs import input_fault
from merger.recipe.recipe import Recipe


def check_inputs(*recipes: Recipe, with_evaluation: bool = False, examples: Mapping[str, str] | None = None) -> None:
    """Raises CheckpointError with all locations that lead nowhere, each with its line and key; opens no connection.

    Texts and statistics count where a stage takes them, held-out examples ``with_evaluation`` alone. ``examples`` are
    further ones by task, relative to the working folder.
    """
    faults = [fault for recipe in recipes for fault in recipe.missing_inputs(with_evaluation=with_evaluation)]
    _refuse([*faults, *_argument_faults(examples or {}, TEXT_FILE)])


def check_models(models: Mapping[str, str]) -> None:
    """Raises CheckpointError with all of the ``models``, by the arguments that name them, that lead nowhere."""
    _refuse(_argument_faults(models, FOLDER))


def _argument_faults(arguments: Mapping[str, str], kind: InputKind) -> list[str]:
    return [
        f"{name}: {fault}" for name, location in arguments.items() if (fault := input_fault(location, kind, Path()))
    ]


def _refuse(faults: list[str]) -> None:
    if faults:
        raise CheckpointError("\n".join(dict.fromkeys(faults)))
