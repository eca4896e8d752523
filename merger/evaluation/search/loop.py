"""The trials of one variant: what its strategy proposes is merged, judged and put on record, until the budget ends."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from merger.errors import CheckpointError, RecipeError
from merger.evaluation.search.record import Record
from merger.evaluation.search.space import Point, Space
from merger.evaluation.search.strategies import Strategy

PATIENCE = 200
"""Proposals in a row that bring nothing new, known or impossible ones, after which a strategy is taken to be done."""


@dataclass(frozen=True)
class Trial:
    """One merge that was judged."""

    variant: str
    trial: int  # from 1 on, in each variant
    point: Point
    objective: float | None  # the higher the better; None where the merge failed
    tasks: dict[str, float]
    merge_seconds: float
    judge_seconds: float
    failed: str | None = None


PointEvaluator = Callable[[Space, Point], tuple[float, dict[str, float], float, float]]
"""Merges and judges a point: objective, each task's measure, seconds of the merge, seconds of the judging."""


def explore(
    variant: str,
    space: Space,
    strategy: Strategy,
    trials: int | None,
    record: Record,
    evaluate_point: PointEvaluator,
    notice: Callable[[str], None],
) -> Iterator[Trial]:
    """The trials of a variant in order, those on record without being made again; ``trials`` None: until it ends.

    RecipeError where the record holds another trial than the strategy proposes.
    """
    recorded = [Trial(**line) for line in record.trials(variant)]
    values: dict[str, float | None] = {}
    value, idle, trial_count = None, 0, 0
    left_out: list[str] = []
    try:
        point = next(strategy)
        while (trials is None or trial_count < trials) and idle < PATIENCE:
            key = json.dumps(point, sort_keys=True)
            if key in values:
                value, idle = values[key], idle + 1
            elif (reason := _recipe_fault(space, point)) is not None:
                value, idle = None, idle + 1
                values[key] = None
                left_out.append(f"{key}: {reason}")
            else:
                trial_count, idle = trial_count + 1, 0
                trial = _recorded_trial(recorded, trial_count, point, record) or _run_trial(
                    variant, trial_count, space, point, record, evaluate_point
                )
                value = values[key] = trial.objective
                yield trial
            point = strategy.send(value)
    except StopIteration:
        pass
    if left_out:
        summary = f"{len(left_out)}, the first of them {left_out[0]}"
        notice(f"points left out, as their values do not go together: {summary}")


def _recipe_fault(space: Space, point: Point) -> str | None:
    """Why a point makes no recipe, or nothing."""
    try:
        space.recipe(point)
    except RecipeError as error:
        return error.faults[0]
    return None


def _recorded_trial(recorded: Sequence[Trial], number: int, point: Point, record: Record) -> Trial | None:
    """The trial of this number on record, which must be of this point."""
    if number > len(recorded):
        return None
    trial = recorded[number - 1]
    if trial.point != point:
        raise RecipeError(
            f"{record.path}: trial {number} is of {json.dumps(trial.point)}, but {json.dumps(point)} is its turn now: "
            "the strategy is not what it was (another optuna?); give another folder with to=FOLDER, or force=True"
        )
    return trial


def _run_trial(
    variant: str, number: int, space: Space, point: Point, record: Record, evaluate_point: PointEvaluator
) -> Trial:
    """Makes a trial; what overflows or ends in an infinite loss has failed, unless nothing has worked so far."""
    objective: float | None = None
    tasks: dict[str, float] = {}
    failed, merging, judging, began = None, 0.0, 0.0, time.monotonic()
    try:
        objective, tasks, merging, judging = evaluate_point(space, point)
    except CheckpointError as error:
        if not any("trial" in line and line["failed"] is None for line in record.lines):
            raise
        failed, merging = str(error), time.monotonic() - began
    if objective is not None and not math.isfinite(objective):
        objective, tasks, failed = None, {}, "its objective is not finite"
    trial = Trial(variant, number, point, objective, tasks, round(merging, 3), round(judging, 3), failed)
    record.add(asdict(trial))
    return trial


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The best trial, of equals the earliest."""
    worked = [trial for trial in trials if trial.objective is not None]
    return max(worked, key=_objective) if worked else None


def _objective(trial: Trial) -> Any:
    return trial.objective
