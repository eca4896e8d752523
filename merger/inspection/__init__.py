"""Judging a merge by its weights: density, overlap, conflict and balance, streamed; statistics and no score."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from merger.engine.machine import peak_memory, select_devices
from merger.engine.manifest import RECORD, Manifest
from merger.engine.prepare import prepare
from merger.engine.recorded_recipe import changed_input, expert_name, recipe_with_merge, unused_name
from merger.errors import CheckpointError, RecipeError, nearest
from merger.inspection import masks
from merger.inspection.merge_facts import facts_of_manifest, facts_of_recipe
from merger.inspection.report import FORMAT, Curve, Curves, Facts, Inspection, Merged, MergeFacts, Picture, View
from merger.inspection.request import InspectionRequest
from merger.inspection.views import curves_of, pictures_of, views_of
from merger.inspection.walk import CountSlice, Walk, count_finished_merge, count_stages, count_task_vectors
from merger.options import RunOptions, check_options, path_argument
from merger.planning.plan import Plan
from merger.recipe.calibration_faults import follows_merge
from merger.recipe.input_locations import check_models
from merger.recipe.recipe import Recipe, as_recipe

__all__ = [
    "Curve",
    "Curves",
    "Facts",
    "Inspection",
    "MergeFacts",
    "Merged",
    "Picture",
    "View",
    "inspect",
    "inspect_merge",
    "inspect_model",
]


def inspect(
    recipe: Recipe | str | Path,
    options: RunOptions = RunOptions(),
    *,
    picture: str | None = None,
    rank: bool = False,
    subspaces: bool = False,
    curves: bool = False,
) -> Inspection:
    """Compares the experts with the base, and the task vectors that every stage of the recipe leaves; writes nothing.

    ``recipe`` may be the path of its file. ``picture`` names a tensor whose positions are mapped. ``rank`` asks for
    effective ranks, ``subspaces`` for the statistics that decompose every matrix, ``curves`` for overlap and balance
    against density. Where stages follow the merged blocks, the task vectors alone are compared. Raises a `MergerError`
    as `merge` does.
    """
    recipe = as_recipe(recipe).as_model()
    facts = facts_of_recipe(recipe)
    notes, count_slice = [], count_stages
    if follows_merge(recipe):
        recipe, count_slice = _averaged(recipe), count_task_vectors
        notes.append(
            "its stages look at blocks behind the merged ones, so this shows the task vectors before them; "
            "`merger run` it, and inspect the output for what became of them"
        )
    with prepare(recipe, options) as prepared:
        walk = Walk(prepared, _request(prepared.plan, picture, rank, subspaces, curves))
        inspection = _inspection(walk, count_slice, "recipe", recipe.base.model, list(recipe.experts), notes)
        return replace(inspection, merge=facts)


def _averaged(recipe: Recipe) -> Recipe:
    """The same models under a method that needs nothing else, for what is compared before any stage."""
    content = {key: value for key, value in recipe.spelled_out().items() if key not in ("pipeline", "calibration")}
    rules = [rule for rule in content["rules"] if "use" in rule]
    return Recipe.parse({**content, "method": "linear", "parameters": {}, "rules": rules}, recipe.folder)


def inspect_model(
    model: str,
    base: str,
    options: RunOptions = RunOptions(),
    *,
    picture: str | None = None,
    rank: bool = False,
    subspaces: bool = False,
    curves: bool = False,
) -> Inspection:
    """Compares one fine-tune with its base; both are folders or Hub repositories."""
    check_models({"base": base, "model": model})
    name = expert_name(model)
    recipe = {"base": base, "experts": {name: model}, "method": "linear", "output": {"path": "nowhere"}}
    with prepare(Recipe.parse(recipe), options) as prepared:
        walk = Walk(prepared, _request(prepared.plan, picture, rank, subspaces, curves))
        return _inspection(walk, count_task_vectors, "model", base, [name])


def inspect_merge(
    folder: str | Path,
    options: RunOptions = RunOptions(),
    *,
    inputs: Path | None = None,
    picture: str | None = None,
    rank: bool = False,
    subspaces: bool = False,
    curves: bool = False,
) -> Inspection:
    """Compares a finished merge with its inputs: the share of every layer that each of them gave.

    The relative paths of its recipe start at ``inputs``, by default at the folder that its output path implies. Where
    an input is missing or differs from the one that was merged, the inspection has the manifest's facts and the reason
    alone. Nothing is downloaded: inputs from the Hub are read from its cache.
    """
    check_options(options)
    folder = path_argument("folder", folder)
    if folder.is_dir() and not (folder / RECORD).is_file():
        raise CheckpointError(f"{folder}: holds no {RECORD}, so it is no merge; give base=MODEL for a fine-tune")
    select_devices(options.device)  # refuses a wrong device, which below would pass for a missing input
    manifest = Manifest.read(folder)
    summary, experts, copied = manifest.summary(), manifest.experts, manifest.copied
    base = summary["inputs"]["base"]
    label = unused_name("merged", experts)
    facts = facts_of_manifest(manifest, folder)
    of_manifest = Inspection(FORMAT, "merge", base, experts, [], [], copied, [], made=summary, merge=facts)
    if manifest.is_packed:
        return _with_notes(of_manifest, masks.describe(folder, manifest.content, experts), options)
    if manifest.recipe.get("layers"):
        reason = "its blocks have other numbers in its inputs (`layers`), so shares cannot be told from the weights"
        return _with_notes(of_manifest, [reason], options)
    try:
        recipe = recipe_with_merge(manifest, folder, label, inputs)
        prepared = prepare(recipe, replace(options, offline=True))
    except (CheckpointError, RecipeError) as error:
        reason = f"shares cannot be told from the weights: {error}; inputs=FOLDER says where they are"
        return _with_notes(of_manifest, [reason], options)
    with prepared:
        plan = prepared.plan
        difference = changed_input(manifest, plan)
        if difference is not None:
            return _with_notes(of_manifest, [f"{difference}, so shares cannot be told from the weights"], options)
        walk = Walk(prepared, _request(plan, picture, rank, subspaces, curves))
        inspection = _inspection(walk, partial(count_finished_merge, plan.models[label]), "merge", base, experts)
        return replace(inspection, made=summary, merge=facts, copied=copied)


def _with_notes(of_manifest: Inspection, notes: Sequence[str], options: RunOptions) -> Inspection:
    """An inspection that compares no weights, with the reasons."""
    for note in notes:
        options.notice(note)
    return replace(of_manifest, notes=list(notes))


def _inspection(
    walk: Walk,
    count_slice: CountSlice,
    subject: Any,
    base: str,
    experts: Sequence[str],
    remarks: Sequence[str] = (),
) -> Inspection:
    start = time.monotonic()
    plan = walk.plan
    notes = [*remarks, *walk.remarks, *plan.notes]
    for note in notes:
        walk.options.notice(note)
    walk.run(count_slice)
    return Inspection(
        format=FORMAT,
        subject=subject,
        base=base,
        experts=list(experts),
        views=views_of(walk.work, experts),
        pictures=pictures_of(walk.work, walk.request.picture, experts),
        curves=curves_of(walk.work, experts),
        copied={tensor.name: tensor.source for tensor in plan.tensors if not tensor.stages},
        notes=notes,
        seconds=round(time.monotonic() - start, 3),
        bytes_read=walk.progress.done,
        peak_memory_bytes=peak_memory(),
    )


def _request(plan: Plan, picture: str | None, rank: bool, subspaces: bool, curves: bool) -> InspectionRequest:
    """The request; RecipeError with the nearest name if no merged tensor has the name ``picture``."""
    names = [tensor.name for tensor in plan.tensors if tensor.stages]
    if picture is not None and picture not in names:
        raise RecipeError(f"picture='{picture}': no such tensor is merged; {nearest(picture, names[:40])}")
    groups = {"rank": rank, "subspaces": subspaces}
    return InspectionRequest(
        picture, frozenset(group for group, is_asked_for in groups.items() if is_asked_for), curves
    )
