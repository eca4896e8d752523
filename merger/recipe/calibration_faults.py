"""Whether the text and the statistics of a recipe are those that its stages take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from merger.pipeline.inputs import StageInput
from merger.pipeline.parameters import Place
from merger.pipeline.registry import Stage, written
from merger.pipeline.stages import Bound, bind, expand
from merger.recipe.document import KeyPath

if TYPE_CHECKING:
    from merger.recipe.recipe import Recipe


def calibration_faults(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    """Returns the faults between the section calibration of a well-formed recipe, its experts and its stages."""
    faults: list[tuple[KeyPath, str]] = []
    experts, calibration = tuple(recipe.experts), recipe.calibration
    if not is_calibrated(recipe):
        return faults
    if calibration is None:
        return [_without_text(recipe)]
    streams = sorted({source.stream for source in _all_inputs(recipe) if source.granularity == "block"}, reverse=True)
    if len(streams) > 1:
        reason = "all text goes one way through the model"
        faults.append(((), f"inputs: {streams[0]} in one method and {streams[1]} in another; {reason}"))
    with_data = (
        set(calibration.data) if isinstance(calibration.data, dict) else set(experts if calibration.data else ())
    )
    from_text = follows_merge(recipe)
    experts_without_text = [
        name for name in experts if name not in (with_data if from_text else with_data | set(calibration.stats))
    ]
    if experts_without_text:
        reason = "no data, as inputs behind merged blocks need it," if from_text else "no data and no stats"
        faults.append((("calibration",), f"{reason} for {', '.join(experts_without_text)}"))
    return faults


def _without_text(recipe: Recipe) -> tuple[KeyPath, str]:
    """Returns the fault of the first choice that needs text, for a recipe without text."""
    place, choice = next(
        (place, choice)
        for place, choice in recipe.choices().items()
        if needs_text(choice.stages, recipe.experts_of(choice))
    )
    files = ", ".join(f"{expert}: {expert}.jsonl" for expert in list(recipe.experts)[:3])
    return (
        (*place, "pipeline" if choice.pipeline else "method"),
        f"looks at layer inputs; add `calibration: {{data: {{{files}}}}}`, text of each expert (docs/calibration.md)",
    )


def follows_merge(recipe: Recipe) -> bool:
    """Whether stages look at blocks behind the merged ones, so that nothing can be said before these are merged."""
    return bool(methods_behind_merge(recipe))


def methods_behind_merge(recipe: Recipe) -> list[str]:
    """Returns the methods and stages, by their names in the recipe, that look at blocks behind the merged ones."""
    behind = [
        stage
        for choice in recipe.choices().values()
        for stage in choice.stages
        if any(item.follows_merge for item in inputs_of([stage], recipe.experts_of(choice)))
    ]
    return [name for stage in behind for name in written(stage)]


def is_calibrated(recipe: Recipe) -> bool:
    """Whether a stage needs an input that is made from calibration text."""
    return any(item.needs_text for item in _all_inputs(recipe))


def needs_text(stages: Iterable[Stage], experts: Sequence[str]) -> bool:
    """Whether one of these stages needs an input that is made from calibration text."""
    return any(item.needs_text for item in inputs_of(stages, experts))


def _all_inputs(recipe: Recipe) -> set[StageInput]:
    """Returns the inputs besides weights that the stages of all choices of a recipe need."""
    choices = recipe.choices().values()
    return {item for choice in choices for item in inputs_of(choice.stages, recipe.experts_of(choice))}


def inputs_of(stages: Iterable[Stage], experts: Iterable[str]) -> set[StageInput]:
    """Returns the inputs besides weights that stages need for a matrix."""
    return {item for bound in matrix_stages(stages, experts) for item in bound.inputs}


def matrix_stages(stages: Iterable[Stage], experts: Iterable[str]) -> list[Bound]:
    """Returns the stages as they are bound for a matrix; none where they cannot be, which is a fault already."""
    place = Place(tuple(experts))
    try:
        return [bind(expanded, place) for stage in stages for expanded in expand(stage, "linear", place.experts)]
    except ValueError:
        return []
