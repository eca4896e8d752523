"""Whether a recipe has the text that its stages need, and stages whose inputs can be made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from merger.errors import nearest
from merger.pipeline.inputs import StageInput
from merger.pipeline.parameters import Place
from merger.pipeline.stages import Bound, bind, expand
from merger.recipe.document import KeyPath

if TYPE_CHECKING:
    from merger.recipe.layers import Layer
    from merger.recipe.recipe import Recipe
    from merger.recipe.sections import Choice


def calibration_faults(recipe: Recipe) -> list[tuple[KeyPath, str]]:
    """Returns the faults of the recipe's text and statistics: unknown experts, and experts without text."""
    faults: list[tuple[KeyPath, str]] = []
    experts, calibration = tuple(recipe.experts), recipe.calibration
    if calibration is not None:
        by_expert = {"data": calibration.data, "stats": calibration.stats, "samples": calibration.samples}
        for key, value in by_expert.items():
            for name in value if isinstance(value, dict) else ():
                if name not in experts:
                    faults.append((("calibration", key, name), f"there is no such expert; {nearest(name, experts)}"))
    if not is_calibrated(recipe):
        return faults
    if calibration is None:
        return [_without_text(recipe), *faults]
    streams = sorted({source.stream for source in _inputs(recipe) if source.granularity == "block"}, reverse=True)
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
        if any(source.needs_text for source in _inputs(recipe, choice))
    )
    files = ", ".join(f"{expert}: {expert}.jsonl" for expert in list(recipe.experts)[:3])
    return (
        (*place, "pipeline" if choice.pipeline else "method"),
        f"looks at layer inputs; add `calibration: {{data: {{{files}}}}}`, text of each expert (docs/calibration.md)",
    )


def follows_merge(recipe: Recipe) -> bool:
    """Whether stages look at blocks behind the merged ones, so that nothing can be said before these are merged."""
    return any(source.follows_merge for source in _inputs(recipe))


def is_calibrated(recipe: Recipe) -> bool:
    """Whether a stage needs an input that is made from calibration text."""
    return any(source.needs_text for source in _inputs(recipe))


def _inputs(recipe: Recipe, *choices: Choice) -> set[StageInput]:
    """Returns the inputs besides weights that the stages of ``choices`` need, by default of all choices."""
    return {source for bound in _bounds(recipe, *choices) for source in bound.inputs}


def _bounds(recipe: Recipe, *choices: Choice) -> list[Bound]:
    """Binds the stages of ``choices``, by default of all choices, for a matrix."""
    try:
        return [
            bind(expanded, Place(recipe.experts_of(choice)))
            for choice in choices or recipe.choices().values()
            for stage in choice.stages
            for expanded in expand(stage, "linear", recipe.experts_of(choice))
        ]
    except ValueError:  # is a fault already
        return []


def lockstep_faults(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Yields the choices whose inputs are made block by block, where `layers` put the blocks in another order."""
    for path, choice in recipe.choices().items() if recipe.layers else ():
        if source := next((source for source in _inputs(recipe, choice) if source.follows_merge), None):
            yield (
                (*path, "pipeline" if choice.pipeline else "method"),
                f"takes {source.name} behind the merged blocks, whose order `layers` change for each expert; merge "
                "without `layers` first, and put that output's blocks in order by a second recipe",
            )
    for i, layer in enumerate(recipe.layers):
        names = _block_inputs(recipe, layer)
        if names and _has_unlike_ranges(recipe, layer):
            yield (
                ("layers", i, "range"),
                f"takes blocks of other numbers from each expert, but {names[0]} is made for block n of all experts "
                "together; write one range for the experts, or a method that takes no Gram matrices",
            )


def _has_unlike_ranges(recipe: Recipe, layer: Layer) -> bool:
    """Whether an entry of `layers` merges blocks that have other numbers in one expert than in another."""
    numbers = {numbers for label, numbers in layer.ranges(("base", *recipe.experts)).items() if label != "base"}
    return layer.model is None and len(numbers) > 1


def _block_inputs(recipe: Recipe, layer: Layer) -> list[str]:
    """The inputs of experts' own blocks that stages may take for the blocks of an entry of `layers`."""
    sources = _inputs(recipe, layer if layer.has_method else recipe, *recipe.rules)
    return sorted(source.name for source in sources if source.granularity == "block" and not source.follows_merge)
