"""What a merge is of, how it is made and where it goes, from its recipe or its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merger.engine.manifest import Manifest
from merger.inspection.report import MergeFacts
from merger.pipeline.registry import stage_names
from merger.recipe.recipe import Recipe

LAYERS = "layers"
"""The method of a recipe that has none: it takes layers as they are."""


def facts_of_recipe(recipe: Recipe) -> MergeFacts:
    """The facts of a recipe, with the locations that it writes."""
    sources = {"base": recipe.base, **recipe.experts}
    inputs = {label: source.adapter or source.model for label, source in sources.items()}
    return MergeFacts(stage_names(recipe.stages) or LAYERS, len(recipe.rules), inputs, str(recipe.output.path))


def facts_of_manifest(manifest: Manifest, folder: Path) -> MergeFacts:
    """The facts of the finished merge in a folder."""
    inputs = {label: record.get("adapter source", record["source"]) for label, record in manifest.inputs.items()}
    return MergeFacts(_method(manifest.recipe), len(manifest.recipe["rules"]), inputs, str(folder))


def _method(recipe: dict[str, Any]) -> str:
    """The method of a recipe that is spelled out, or its stages with + between them."""
    return recipe.get("method") or "+".join(name for stage in recipe.get("pipeline", ()) for name in stage) or LAYERS
