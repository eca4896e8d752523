"""Whether the entries of `layers` agree with the rest of the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from merger.pipeline.stages import entries_of
from merger.recipe.calibration_faults import inputs_of
from merger.recipe.document import KeyPath
from merger.recipe.layers import Layer

if TYPE_CHECKING:
    from merger.pipeline.parameters import Number
    from merger.recipe.recipe import Recipe

Fault = tuple[KeyPath, str]


def layer_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yields the faults of the recipe's `layers` that need no model to be seen, with their keys."""
    for i, layer in enumerate(recipe.layers):
        faults = _merge_faults(recipe, layer) if layer.model is None else _copy_faults(recipe, layer.model, layer)
        yield from ((("layers", i, *path), message) for path, message in faults)
    yield from _pack_faults(recipe)
    yield from _lockstep_faults(recipe)


def weights_of(node: Mapping[str, Any], weights: Mapping[str, Number]) -> Mapping[str, Number]:
    """The weights of the experts that a written choice merges: those of its `range`, where that is by model."""
    ranges = node.get("range")
    if not isinstance(ranges, Mapping) or not ranges.keys() & weights.keys():
        return weights
    return {name: weight for name, weight in weights.items() if name in ranges}


def _copy_faults(recipe: Recipe, model: str, layer: Layer) -> Iterator[Fault]:
    if isinstance(layer.range, Mapping):
        yield ("range",), f"expected one range, as in [0, 24], since the blocks of {model} alone are copied"
    if layer.has_method:
        yield (
            ("pipeline" if layer.pipeline else "method",),
            "merges, but `model` copies the blocks of one model; leave `model` out to merge",
        )


def _merge_faults(recipe: Recipe, layer: Layer) -> Iterator[Fault]:
    if layer.scale != 1:
        yield ("scale",), "is about copies; add the `model` that is copied, or a stage `scale` to a pipeline"
    if not recipe.experts:
        yield (), "merges, but there are no experts; copy with `model: base`, or add experts"
    elif not layer.has_method and not recipe.has_method:
        yield (), "expected a `model` to copy or a method to merge by, since the recipe has no method"
    if isinstance(layer.range, Mapping):
        yield from _range_faults(recipe, layer, layer.range)


def _range_faults(recipe: Recipe, layer: Layer, ranges: Mapping[str, list[int]]) -> Iterator[Fault]:
    """Yields the faults of ranges by model: absent models, unequal lengths."""
    models = ["base", *recipe.experts]
    absent = [label for label in models if label not in ranges]
    if "base" in absent:
        yield ("range",), "names no blocks of base, where task vectors start; add them, as in {base: [0, 8], ...}"
    elif absent == models[1:]:
        yield ("range",), f"names no expert; add blocks of {' or '.join(absent)}, or write `model: base` to copy"
    elif absent and recipe.has_method and not layer.has_method:
        names = ", ".join(absent)
        yield ("range",), f"names no blocks of {names}, which the recipe's method merges; add them, or a method"
    counts = {label: stop - first for label, (first, stop) in ranges.items()}
    (first_label, count), *others = counts.items()
    for label, other_count in others:
        if other_count != count:
            yield (
                ("range", label),
                f"is {other_count} long, but the range of {first_label} is {count} long; expected equal lengths",
            )


def _pack_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yields the packs, whose experts could not be told apart again in blocks of several models."""
    for path, choice in recipe.choices().items() if recipe.layers else ():
        entries = {entry for stage in choice.stages for entry in entries_of(stage, recipe.experts_of(choice))}
        for name in sorted(entry.name for entry in entries if entry.packing is not None):
            message = f"{name} stores several experts, and `layers` make one model; take another method"
            yield (*path, "pipeline" if choice.pipeline else "method"), message


def _lockstep_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yields the choices whose inputs are made block by block, where `layers` put the blocks in another order."""
    for path, choice in recipe.choices().items() if recipe.layers else ():
        inputs = inputs_of(choice.stages, recipe.experts_of(choice))
        if behind := sorted(item.name for item in inputs if item.follows_merge or item.of_task_vectors):
            yield (
                (*path, "pipeline" if choice.pipeline else "method"),
                f"takes {behind[0]} behind the merged blocks, whose order `layers` change for each expert; merge "
                "without `layers` first, and put that output's blocks in order by a second recipe",
            )
    for i, layer in enumerate(recipe.layers):
        names = _block_inputs(recipe, layer) if _has_unlike_ranges(recipe, layer) else []
        if names:
            yield (
                ("layers", i, "range"),
                f"takes blocks of other numbers from each expert, but {names[0]} is made for block n of all experts "
                "together; write one range for the experts, or a method that takes no Gram matrices",
            )


def _has_unlike_ranges(recipe: Recipe, layer: Layer) -> bool:
    """Whether an entry merges blocks that have other numbers in one expert than in another."""
    numbers = {numbers for label, numbers in layer.ranges(("base", *recipe.experts)).items() if label != "base"}
    return layer.model is None and len(numbers) > 1


def _block_inputs(recipe: Recipe, layer: Layer) -> list[str]:
    """The inputs of experts' own blocks that stages may take for the blocks of an entry."""
    choices = [layer if layer.has_method else recipe, *recipe.rules]
    inputs = {item for choice in choices for item in inputs_of(choice.stages, recipe.experts_of(choice))}
    return sorted(item.name for item in inputs if item.granularity == "block" and not item.follows_merge)
