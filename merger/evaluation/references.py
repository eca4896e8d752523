"""The base and the experts that all evaluated merges share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merger.engine.manifest import RECORD, Manifest
from merger.engine.recorded_recipe import recipe_with_merge, unused_name
from merger.errors import RecipeError
from merger.recipe.recipe import Recipe


def family_of(subjects: Mapping[str, Recipe | Path], inputs: Path | None = None) -> Recipe:
    """A recipe with the base and experts of the first recipe, or else of the first folder that merger made.

    RecipeError if there is neither, or if the recipes differ in base or experts.
    """
    recipes = {label: subject for label, subject in subjects.items() if isinstance(subject, Recipe)}
    for label, recipe in recipes.items():
        first = next(iter(recipes))
        if _sources(recipe) != _sources(recipes[first]):
            raise RecipeError(f"{label}: has another base or other experts than {first}; judge each by itself")
    if recipes:
        return next(iter(recipes.values()))
    merge_folders = [
        subject for subject in subjects.values() if isinstance(subject, Path) and (subject / RECORD).is_file()
    ]
    if not merge_folders:
        names = ", ".join(map(str, subjects.values()))
        raise RecipeError(
            f"{names}: no {RECORD} says what was merged; give the recipe too, which names base and experts"
        )
    manifest = Manifest.read(merge_folders[0])
    label = unused_name("merge", manifest.inputs)
    recipe = recipe_with_merge(manifest, merge_folders[0], label, inputs)
    return recipe.model_copy(update={"experts": {k: subject for k, subject in recipe.experts.items() if k != label}})


def _sources(recipe: Recipe) -> Any:
    """The model and adapter of base and experts, with folders as absolute paths."""

    def place(name: str | None) -> str | None:
        if name is None:
            return None
        path = recipe.folder / Path(name).expanduser()
        return str(path.resolve()) if path.is_dir() else name

    models = {"base": recipe.base, **recipe.experts}
    return {label: (place(model_source.model), place(model_source.adapter)) for label, model_source in models.items()}
