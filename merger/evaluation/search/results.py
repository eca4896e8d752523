"""The output files of a search: the best recipe, and a report of all trials and of the best merges."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merger._version import MARK
from merger.checkpoint.files import check_replaceable, replace_bytes
from merger.evaluation import tables
from merger.evaluation.scores import objective_text
from merger.evaluation.search.loop import Trial
from merger.evaluation.search.space import Space

if TYPE_CHECKING:
    from merger.evaluation.search import SearchResult


BEST, REPORT = "best.yaml", "report.md"


def check_folder(folder: Path) -> None:
    """RecipeError if the folder holds a recipe or a report of these names that no search wrote."""
    for name in (BEST, REPORT) if folder.is_dir() else ():
        check_replaceable(folder / name)


def setting(point: Mapping[str, Any]) -> str:
    """A point as JSON, with the prefix ``parameters.`` removed from its keys."""
    return json.dumps({name.removeprefix("parameters."): value for name, value in point.items()})


def line(trial: Trial, best: Trial | None, trials: int | None, objective: str, measures: Mapping[str, str]) -> str:
    """One line that describes a trial: setting, objective, best objective so far, seconds.

    ``measures`` are those of the tasks by name.
    """
    of = f" of {trials}" if trials else ""
    prefix = f"{trial.variant} " if trial.variant else ""
    if trial.objective is None:
        return f"{prefix}trial {trial.trial}{of}: {setting(trial.point)}: failed: {trial.failed}"
    value = objective_text(objective, trial.objective, measures)
    top = ""
    if best is not None and best.objective is not None:
        top = f", best so far {objective_text(objective, best.objective, measures)}"
    return (
        f"{prefix}trial {trial.trial}{of}: {setting(trial.point)}: {objective} {value}{top}; "
        f"merged in {trial.merge_seconds:.1f} s, judged in {trial.judge_seconds:.1f} s"
    )


def write(result: SearchResult, folder: Path, space: Space, recipe: Path) -> None:
    """Writes best.yaml and report.md."""
    winner = result.winner
    score = f"{result.objective} {result.objective_text(winner)} on its search data"
    heading = f"# Found by `merger search {recipe.name}`, {MARK}: {score}.\n"
    value = space.document_at(winner.point).value
    text = yaml.safe_dump(_rebased(value, space.document.folder, folder.resolve()), sort_keys=False, allow_unicode=True)
    replace_bytes(folder / BEST, (heading + text).encode())
    replace_bytes(folder / REPORT, ("\n".join(_page(result, recipe)) + "\n").encode())


def _page(result: SearchResult, recipe: Path) -> Iterator[str]:
    trial_count = sum(map(len, result.trials.values()))
    yield f"# {recipe.name}: {trial_count} trials"
    yield ""
    yield (
        f"Each variant's setting is the one with the best {result.objective} on the search data. This table is of "
        "other examples, which no trial has seen and which chose nothing."
    )
    yield ""
    yield from tables.markdown(result.report)
    yield ""
    yield "## The search"
    yield ""
    yield f"| variant | trials | failed | best {result.objective} (search data) | setting | merge, s | judging, s |"
    yield "|---|---|---|---|---|---|---|"
    for variant, trials in result.trials.items():
        best = result.best.get(variant)
        best_cells = ["", ""] if best is None else [result.objective_text(best), f"`{setting(best.point)}`"]
        merging, judging = (_median([getattr(t, key) for t in trials]) for key in ("merge_seconds", "judge_seconds"))
        failed = sum(trial.objective is None for trial in trials)
        cells = [variant or recipe.stem, len(trials), failed, *best_cells, f"{merging:.1f}", f"{judging:.1f}"]
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    yield "Examples by SHA-256: " + ", ".join(
        f"{name} {task.sha256[:16]}" for name, task in result.report.tasks.items()
    )
    yield ""
    yield ", ".join(f"{name} {version}" for name, version in result.report.versions.items()) + f"; {MARK}."


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _rebased(value: Any, start: Path, to: Path, key: str = "") -> Any:
    """A recipe's value with every existing path, and the output path, rewritten relative to the folder ``to``."""
    if isinstance(value, dict):
        return {name: _rebased(item, start, to, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_rebased(item, start, to) for item in value]
    is_path = isinstance(value, str) and not os.path.isabs(os.path.expanduser(value))
    if is_path and (key == "path" or (start / value).exists()):
        return os.path.relpath(start.resolve() / value, to)
    return value
