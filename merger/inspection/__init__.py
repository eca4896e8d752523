"""What a merge would do, and what it did: density, overlap, conflict and balance, streamed; facts and no score."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from merger.engine.machine import peak_memory
from merger.engine.manifest import RECORD, Manifest
from merger.engine.prepare import prepare
from merger.engine.recorded_recipe import changed_input, expert_name, recipe_with_merge, unused_name
from merger.errors import CheckpointError, RecipeError, nearest
from merger.inspection import masks
from merger.inspection.counters import Wanted
from merger.inspection.report import FORMAT, Curve, Curves, Facts, Inspection, Merged, Picture, View
from merger.inspection.walk import Walk, Watch, between_stages, finished, task_vectors
from merger.options import RunOptions
from merger.planning.plan import Plan
from merger.recipe.recipe import Recipe

__all__ = [
    "Curve",
    "Curves",
    "Facts",
    "Inspection",
    "Merged",
    "Picture",
    "View",
    "inspect",
    "inspect_merge",
    "inspect_model",
]


def inspect(
    recipe: Recipe,
    options: RunOptions = RunOptions(),
    *,
    picture: str | None = None,
    rank: bool = False,
    curves: bool = False,
) -> Inspection:
    """Looks at the experts against the base, and at what every stage of the recipe leaves; writes nothing.

    ``picture`` names a tensor whose kept positions are mapped, ``rank`` asks for effective ranks and ``curves`` for
    overlap and balance against density. Raises a `MergerError` as `merge` does.
    """
    with prepare(recipe, options) as prepared:
        if any(tensor.fed_by_merged for tensor in prepared.plan.tensors):
            raise RecipeError("inputs: merged needs merged blocks, which are not made here; run it first")
        walk = Walk(prepared, _wanted(prepared.plan, picture, rank, curves))
        return _seen(walk, between_stages, "recipe", recipe.base.model, list(recipe.experts))


def inspect_model(
    model: str,
    base: str,
    options: RunOptions = RunOptions(),
    *,
    picture: str | None = None,
    rank: bool = False,
    curves: bool = False,
) -> Inspection:
    """Looks at where one fine-tune changed its base; both are folders or Hub repositories."""
    name = expert_name(model)
    written = {"base": base, "experts": {name: model}, "method": "linear", "output": {"path": "nowhere"}}
    with prepare(Recipe.parse(written), replace(options, device="cpu")) as prepared:
        walk = Walk(prepared, _wanted(prepared.plan, picture, rank, curves))
        return _seen(walk, task_vectors, "model", base, [name])


def inspect_merge(
    folder: Path,
    options: RunOptions = RunOptions(),
    *,
    inputs: Path | None = None,
    picture: str | None = None,
    rank: bool = False,
    curves: bool = False,
) -> Inspection:
    """Looks at a finished merge: what each input's share of every layer is, told from the weights.

    ``inputs`` is what relative paths of its recipe start at, by default where its own output path says.
    Where an input is gone or another one by now, only what the manifest says is told, and why. Nothing is
    downloaded: what came from the Hub is looked for in its cache.
    """
    if not (folder / RECORD).is_file():
        raise CheckpointError(f"{folder}: holds no {RECORD}, so it is no merge; give --base for a fine-tune")
    manifest = Manifest.read(folder)
    made, experts, copied = manifest.summary(), manifest.experts, manifest.copied
    base = made["inputs"]["base"]
    label = unused_name("merged", experts)
    known = Inspection(FORMAT, "merge", base, experts, [], [], copied, [], made=made)
    if manifest.is_packed:
        return _told(known, masks.told(folder, manifest.content, experts), options)
    try:
        recipe = recipe_with_merge(manifest, folder, label, inputs)
        prepared = prepare(recipe, replace(options, device="cpu", offline=True))
    except (CheckpointError, RecipeError) as error:
        why = f"shares cannot be told from the weights: {error}; --inputs says where they are"
        return _told(known, [why], options)
    with prepared:
        plan = prepared.plan
        changed = changed_input(manifest, plan)
        if changed is not None:
            return _told(known, [f"{changed}, so shares cannot be told from the weights"], options)
        walk = Walk(prepared, _wanted(plan, picture, rank, curves))
        seen = _seen(walk, partial(finished, plan.models[label]), "merge", base, experts)
        return replace(seen, made=made, copied=copied)


def _told(known: Inspection, notes: Sequence[str], options: RunOptions) -> Inspection:
    """What is known without comparing weights, and what there is to say."""
    for note in notes:
        options.notice(note)
    return replace(known, notes=list(notes))


def _seen(walk: Walk, watch: Watch, subject: Any, base: str, experts: Sequence[str]) -> Inspection:
    began = time.monotonic()
    plan = walk.plan
    for note in plan.notes:
        walk.options.notice(note)
    walk.run(watch)
    return Inspection(
        format=FORMAT,
        subject=subject,
        base=base,
        experts=list(experts),
        views=walk.views(experts),
        pictures=walk.pictures(experts),
        curves=walk.curves(experts),
        copied={tensor.name: tensor.source for tensor in plan.tensors if not tensor.stages},
        notes=list(plan.notes),
        seconds=round(time.monotonic() - began, 3),
        bytes_read=walk.progress.done,
        peak_memory_bytes=peak_memory(),
    )


def _wanted(plan: Plan, picture: str | None, rank: bool, curves: bool) -> Wanted:
    """What is asked for; RecipeError with the near name if no such tensor as ``picture`` is merged."""
    names = [tensor.name for tensor in plan.tensors if tensor.stages]
    if picture is not None and picture not in names:
        raise RecipeError(f"--tensor {picture}: no such tensor is merged; {nearest(picture, names[:40])}")
    return Wanted(picture, rank, curves)
