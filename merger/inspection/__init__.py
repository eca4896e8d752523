"""Judging a merge by its weights: density, overlap, conflict and balance, streamed; statistics and no score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from merger.calibration.statistics import Options, grams, load
from merger.calibration.statistics import calibrate as statistics_files
from merger.engine import merge_inputs as manifests
from merger.engine.machine import Machine, peak_memory
from merger.engine.manifest import is_packed
from merger.errors import CheckpointError, RecipeError, nearest
from merger.inspection import masks
from merger.inspection.report import FORMAT, Curve, Curves, Facts, Inspection, Merged, Picture, View
from merger.inspection.request import InspectionRequest
from merger.inspection.views import curves_of, pictures_of, views_of
from merger.inspection.walk import (
    Blocks,
    CountSlice,
    Walk,
    count_finished_merge,
    count_stages,
    count_task_vectors,
)
from merger.planning.plan import Plan
from merger.planning.planner import plan as make_plan
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
    *,
    picture: str | None = None,
    rank: bool = False,
    subspaces: bool = False,
    curves: bool = False,
    device: str = "auto",
    max_memory: int | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Inspection:
    """Compares the experts with the base, and the task vectors that every stage of the recipe leaves; writes nothing.

    ``picture`` names a tensor whose positions are mapped. ``rank`` asks for effective ranks, ``subspaces`` for the
    statistics that decompose every matrix, ``curves`` for overlap and balance against density. Raises a `MergerError`
    as `merge` does.
    """
    tell, say = progress or _silent, notice or _silent
    plan = make_plan(recipe, offline=offline, headers_only=False)
    try:
        if any(tensor.fed_by_merged for tensor in plan.tensors):
            raise RecipeError("inputs: merged needs merged blocks, which are not made here; run it first")
        machine = Machine.of(device, max_memory, plan)
        options = Options(machine.device, machine.hidden, trust_remote_code)
        paths = statistics_files(plan, options, notice=say, progress=tell) if plan.needs_statistics else {}
        blocks = grams(plan, options, _never_merged, notice=say, progress=tell)
        walk = Walk(
            plan,
            machine,
            load(plan, paths),
            notice=say,
            progress=tell,
            request=_request(plan, picture, rank, subspaces, curves),
        )
        return _inspection(walk, count_stages, "recipe", recipe.base.model, list(recipe.experts), blocks)
    finally:
        plan.close()


def inspect_model(
    model: str,
    base: str,
    *,
    picture: str | None = None,
    rank: bool = False,
    subspaces: bool = False,
    curves: bool = False,
    max_memory: int | None = None,
    offline: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Inspection:
    """Compares one fine-tune with its base; both are folders or Hub repositories."""
    name = manifests.expert_name(model)
    recipe = {"base": base, "experts": {name: model}, "method": "linear", "output": {"path": "nowhere"}}
    plan = make_plan(Recipe.parse(recipe), offline=offline, headers_only=False)
    try:
        walk = Walk(
            plan,
            Machine.of("cpu", max_memory, plan),
            {},
            notice=notice or _silent,
            progress=progress or _silent,
            request=_request(plan, picture, rank, subspaces, curves),
        )
        return _inspection(walk, count_task_vectors, "model", base, [name])
    finally:
        plan.close()


def inspect_merge(
    folder: Path,
    *,
    inputs: Path | None = None,
    picture: str | None = None,
    rank: bool = False,
    subspaces: bool = False,
    curves: bool = False,
    max_memory: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Inspection:
    """Compares a finished merge with its inputs: the share of every layer that each of them gave.

    The relative paths of its recipe start at ``inputs``, by default at the folder that its output path implies. Where
    an input is missing or differs from the one that was merged, the inspection has the manifest's facts and the reason
    alone. Nothing is downloaded: inputs from the Hub are read from its cache.
    """
    record = manifests.read(folder)
    summary, experts = manifests.summary(record), list(record["recipe"]["experts"])
    copied = manifests.copied(record)
    base = summary["inputs"]["base"]
    label = manifests.unlike("merged", experts)
    of_manifest = Inspection(FORMAT, "merge", base, experts, [], [], copied, [], made=summary)
    say = notice or _silent
    if is_packed(record):
        return _with_notes(of_manifest, masks.describe(folder, record, experts), say)
    try:
        plan = make_plan(manifests.beside(record, folder, label, inputs), offline=True, headers_only=False)
    except (CheckpointError, RecipeError) as error:
        reason = f"shares cannot be told from the weights: {error}; --inputs says where they are"
        return _with_notes(of_manifest, [reason], say)
    try:
        difference = manifests.changed(record, plan)
        if difference is not None:
            return _with_notes(of_manifest, [f"{difference}, so shares cannot be told from the weights"], say)
        walk = Walk(
            plan,
            Machine.of("cpu", max_memory, plan),
            {},
            notice=say,
            progress=progress or _silent,
            request=_request(plan, picture, rank, subspaces, curves),
        )
        inspection = _inspection(walk, partial(count_finished_merge, plan.models[label]), "merge", base, experts)
        return replace(inspection, made=summary, copied=copied)
    finally:
        plan.close()


def _with_notes(of_manifest: Inspection, notes: Sequence[str], notice: Callable[[str], None]) -> Inspection:
    """An inspection that compares no weights, with the reasons."""
    for note in notes:
        notice(note)
    return replace(of_manifest, notes=list(notes))


def _inspection(
    walk: Walk, count_slice: CountSlice, subject: Any, base: str, experts: Sequence[str], blocks: Blocks = ()
) -> Inspection:
    start = time.monotonic()
    plan = walk.plan
    for note in plan.notes:
        walk.notice(note)
    walk.run(count_slice, blocks)
    return Inspection(
        format=FORMAT,
        subject=subject,
        base=base,
        experts=list(experts),
        views=views_of(walk.work, experts),
        pictures=pictures_of(walk.work, walk.request.picture, experts),
        curves=curves_of(walk.work, experts),
        copied={tensor.name: tensor.source for tensor in plan.tensors if not tensor.stages},
        notes=list(plan.notes),
        seconds=round(time.monotonic() - start, 3),
        bytes_read=walk.done_bytes,
        peak_memory_bytes=peak_memory(),
    )


def _request(plan: Plan, picture: str | None, rank: bool, subspaces: bool, curves: bool) -> InspectionRequest:
    """The request; RecipeError with the nearest name if no merged tensor has the name ``picture``."""
    names = [tensor.name for tensor in plan.tensors if tensor.stages]
    if picture is not None and picture not in names:
        raise RecipeError(f"--tensor {picture}: no such tensor is merged; {nearest(picture, names[:40])}")
    groups = {"rank": rank, "subspaces": subspaces}
    return InspectionRequest(picture, frozenset(group for group, asked_for in groups.items() if asked_for), curves)


def _never_merged(name: str) -> None:
    """An inspection merges nothing."""


def _silent(*_: object) -> None:
    """Ignores a message."""
