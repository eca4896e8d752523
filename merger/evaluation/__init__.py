"""Evaluation of base, experts and merges on the same held-out examples, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.errors import RecipeError
from merger.options import RunOptions, check_options, path_argument
from merger.recipe.input_locations import check_inputs
from merger.recipe.recipe import Recipe, as_recipe
from merger.recipe.sections import Evaluation

if TYPE_CHECKING:
    from merger.evaluation.harness import HarnessTasks
    from merger.evaluation.scores import Comparison

__all__ = ["EvaluationSettings", "evaluate"]


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings that replace those of the recipe's section ``evaluation``; None leaves a setting as it is there."""

    data: Mapping[str, str] | None = None  # by task, relative to the working folder
    samples: int | None = None
    max_tokens: int | None = None
    inputs: Path | None = None  # where the relative paths of a finished merge start
    allow_calibration_text: bool = False
    lm_eval: HarnessTasks | None = None  # tasks of lm-evaluation-harness


def evaluate(
    subjects: Mapping[str, Recipe | str | Path],
    options: RunOptions = RunOptions(),
    *,
    settings: EvaluationSettings = EvaluationSettings(),
) -> Comparison:
    """Evaluates base, experts and the ``subjects`` by name: recipes are merged in memory, folders are read.

    A subject is a recipe, the path of its file, or a folder.

    Base and experts are those of the first recipe, or else of the first folder that merger made; all recipes must
    have the same. Raises a `MergerError` for whatever the user can mend.
    """
    from merger.evaluation import harness, tasks
    from merger.evaluation.evaluator import Evaluator
    from merger.evaluation.model_host import ModelHost
    from merger.evaluation.references import family_of
    from merger.evaluation.scores import compare

    check_options(options)
    if not isinstance(subjects, Mapping):
        raise RecipeError(f"subjects: expected recipes or folders by name, not {type(subjects).__name__}")
    merges = {label: _recipe_or_folder(subject) for label, subject in subjects.items()}
    family = family_of(merges, settings.inputs)
    section = _section(family, settings)
    recipes = [merge for merge in merges.values() if isinstance(merge, Recipe)]
    check_inputs(family, *recipes, with_evaluation=settings.data is None, examples=settings.data)
    held_out = tasks.load(section.data, family.folder if settings.data is None else Path(), section.samples)
    if not settings.allow_calibration_text:
        for recipe in (family, *recipes):
            tasks.check_apart(recipe, held_out)
    tasks_of_harness = None if settings.lm_eval is None else harness.load(settings.lm_eval, offline=options.offline)
    with ModelHost(options, section.dtype) as model_host:
        evaluator = Evaluator(model_host, family, held_out, section.max_tokens, tasks_of_harness)
        entries = [*evaluator.references(), *(evaluator.merge(label, merge) for label, merge in merges.items())]
        return compare(held_out, entries, evaluator.dtype)


def _recipe_or_folder(subject: Recipe | str | Path) -> Recipe | Path:
    """The folder that a path names, or else the recipe."""
    path = None if isinstance(subject, Recipe) else path_argument("subjects", subject)
    return path if path is not None and path.is_dir() else as_recipe(subject)


def _section(family: Recipe, settings: EvaluationSettings) -> Evaluation:
    """The recipe's section ``evaluation`` with the settings that replace its own."""
    replacements: dict[str, Any] = {
        "data": settings.data,
        "samples": settings.samples,
        "max_tokens": settings.max_tokens,
    }
    changed = {key: value for key, value in replacements.items() if value is not None}
    if family.evaluation is not None:
        return family.evaluation.model_copy(update=changed)
    if settings.data is None and settings.lm_eval is None:
        raise RecipeError(
            "there is nothing to judge by: write evaluation: {data: {TASK: FILE}} into the recipe, or give data=FILES "
            "or lm_eval=TASKS"
        )
    return Evaluation.model_construct(**{"data": {}, **changed})  # no examples where lm-eval's tasks alone judge
