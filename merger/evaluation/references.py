"""The base and the experts that several merges have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merger.engine.manifest import RECORD, Manifest
from merger.engine.recorded_recipe import recipe_with_merge, unused_name
from merger.errors import RecipeError
from merger.recipe.recipe import Recipe


def of(subjects: Mapping[str, Recipe | Path], inputs: Path | None = None) -> Recipe:
    """A recipe with the base and experts of the first recipe, or else of the first folder that merger made.

    RecipeError where there is neither, or another recipe has others.
    """
    recipes = {label: each for label, each in subjects.items() if isinstance(each, Recipe)}
    for label, recipe in recipes.items():
        first = next(iter(recipes))
        if _sources(recipe) != _sources(recipes[first]):
            raise RecipeError(f"{label}: has another base or other experts than {first}; judge each by itself")
    if recipes:
        return next(iter(recipes.values()))
    made = [each for each in subjects.values() if isinstance(each, Path) and (each / RECORD).is_file()]
    if not made:
        names = ", ".join(map(str, subjects.values()))
        raise RecipeError(
            f"{names}: no {RECORD} says what was merged; give the recipe too, which names base and experts"
        )
    manifest = Manifest.read(made[0])
    label = unused_name("merge", manifest.inputs)
    recipe = recipe_with_merge(manifest, made[0], label, inputs)
    return recipe.model_copy(update={"experts": {k: each for k, each in recipe.experts.items() if k != label}})


def _sources(recipe: Recipe) -> Any:
    """The models, with folders by where they are."""

    def place(name: str | None) -> str | None:
        if name is None:
            return None
        path = recipe.folder / Path(name).expanduser()
        return str(path.resolve()) if path.is_dir() else name

    models = {"base": recipe.base, **recipe.experts}
    return {label: (place(each.model), place(each.adapter)) for label, each in models.items()}
