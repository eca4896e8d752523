"""Binds the stages of a recipe's choices to the places of tensors."""

from __future__ import annotations

from collections.abc import Sequence

from merger.checkpoint.tensor_kinds import TensorKinds
from merger.errors import RecipeError
from merger.pipeline.parameters import Number, Place, resolve
from merger.pipeline.registry import Stage, entry_of
from merger.pipeline.stages import Bound, bind, expand
from merger.planning.linear_order import linear_turns
from merger.planning.output_names import Choices
from merger.recipe.layers import Layer
from merger.recipe.sections import Rule


class StageBinder:
    """Makes each place and each bound stage once for all tensors of a kind in a block.

    A mixture of experts has tens of thousands of tensors, but only hundreds of places and bound stages.
    """

    def __init__(self, choices: Choices) -> None:
        self._choices, recipe = choices, choices.recipe
        self._by_group = tuple(recipe.choices().values())
        self.turns = [linear_turns(choice.stages, len(recipe.experts_of(choice))) for choice in self._by_group]
        self._places: dict[tuple[str, int, bool], Place] = {}
        self._bound: dict[tuple[int, str, str, int], tuple[Bound, ...]] = {}

    def place(self, name: str, kinds: TensorKinds, choice: Rule | Layer | None, number: int) -> Place:
        """Where a tensor stands: the same object for all tensors of a block.

        ``number`` counts the linear layers before it. Lists in the parameters of an entry of `layers` go from the
        entry's first block to its last, all others from the first block of the output to its last.
        """
        linear = number % self.turns[self._choices.group(choice)]
        key = kinds.unit(name), linear, isinstance(choice, Layer)
        if key not in self._places:
            block, depth = self._choices.blocks.block(name), kinds.depth(name)
            experts = tuple(self._choices.models(name, choice)[1:])
            sources, here = self._choices.recipe.experts, Place((), depth=depth)
            weights = tuple(resolve(Number, sources[expert].weight, here) for expert in experts)
            entry_depth = block.depth if block is not None and isinstance(choice, Layer) else depth
            self._places[key] = Place(experts, weights, entry_depth, kinds.rotation(name), linear)
        return self._places[key]

    def bound(self, choice: Rule | Layer | None, kind: str, unit: str, place: Place) -> tuple[Bound, ...]:
        """The stages of a choice for tensors of a kind in a block; RecipeError if parameters conflict."""
        group = self._choices.group(choice)
        key = group, kind, unit, place.linear
        if key not in self._bound:
            self._bound[key] = _bind(self._by_group[group].stages, kind, place)
        return self._bound[key]


def _bind(stages: Sequence[Stage], kind: str, place: Place) -> tuple[Bound, ...]:
    try:
        return tuple(bind(expansion, place) for stage in stages for expansion in expand(stage, kind, place.experts))
    except ValueError as error:
        raise RecipeError(f"{entry_of(stages[0].func).name}: {error}") from None
