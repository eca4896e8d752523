"""Configurations of mergekit, told from recipes by their keys."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merger.recipe.document import KeyPath

_MERGEKIT = {("models",), ("slices",), ("modules",), ("base_model",)}
_RECIPE = {("base",), ("experts",), ("output",)}


def is_mixture(keys: Collection[KeyPath]) -> bool:
    """Whether the keys are those of a configuration of mergekit-moe."""
    return ("experts", 0, "source_model") in keys or (("gate_mode",) in keys and ("base",) not in keys)


def mixture_fault(label: str) -> str:
    """The message for a configuration of mergekit-moe."""
    return (
        f"{label}: is a mergekit-moe configuration; merger makes no mixture of experts, so merger import has no "
        "equivalent; merger init BASE EXPERT... writes a recipe that merges the same models into one"
    )


def foreign_fault(label: str, keys: Collection[KeyPath]) -> str | None:
    """The message for a file that is a configuration of mergekit and no recipe; None for any other."""
    if is_mixture(keys):
        return mixture_fault(label)
    if ("merge_method",) in keys or (_MERGEKIT.intersection(keys) and not _RECIPE.intersection(keys)):
        file = Path(label)
        recipe = file.with_name(f"{file.stem}-recipe.yaml")
        command = shlex.join(["merger", "import", label, "-o", str(recipe)])
        return f"{label}: is a mergekit configuration, not a recipe; make it one with: {command}"
    return None


def recipe_fault(label: str, keys: Collection[KeyPath]) -> str | None:
    """The message for a file that is a recipe already and no configuration of mergekit; None for any other."""
    is_recipe = {("base",), ("experts",)}.issubset(keys) and ("merge_method",) not in keys
    return f"{label}: is a recipe of merger already; {shlex.join(['merger', 'plan', label])}" if is_recipe else None
