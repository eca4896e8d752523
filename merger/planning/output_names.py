"""The tensors of a merge's output: the base's, and those that a rule or an untied head adds from an expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from merger.checkpoint.tensor_kinds import TensorKinds, block_of
from merger.planning.block_map import BlockMap
from merger.planning.shared_tensors import SharedTensors
from merger.recipe.layers import Layer
from merger.recipe.recipe import Recipe, choice_name
from merger.recipe.sections import Rule


@dataclass
class OutputNames:
    """The names of the output's tensors, and the experts' tensors that are dropped or repeated."""

    names: list[str]
    dropped: dict[str, dict[str, str]]  # per model: tensors that are left out, and why
    repeated: dict[str, str] = field(default_factory=dict)  # those that repeat a tensor of the base, and its name
    faults: list[str] = field(default_factory=list)

    def drop(self, name: str, labels: Iterable[str], reason: str) -> None:
        """Leaves a tensor of some experts out."""
        for label in labels:
            self.dropped[label][name] = reason


def output_names(choices: Choices, kinds: Mapping[str, TensorKinds], shared_tensors: SharedTensors) -> OutputNames:
    """Returns the names of the output: the base's, then those of experts' tensors that rules or copies add.

    An expert's tensor that the base lacks is added, dropped with a reason, or a fault.
    """
    output = OutputNames(list(kinds["base"].tensors), {label: {} for label in kinds})
    extra = dict.fromkeys(n for kind in kinds.values() for n in kind.tensors if n not in kinds["base"].tensors)
    for name in extra:
        holders = [label for label, kind in kinds.items() if name in kind.tensors]
        choice = choices.of(name, kinds[holders[0]])
        if original := shared_tensors.repeated(name, holders):
            output.repeated[name] = original
            output.drop(name, holders, f"is {original}, stored once more")
        elif choice is not None and choice.use in holders:
            output.names.append(name)
        elif choice is not None and choice.use == "base":
            output.drop(name, holders, f"{choices.name(choice)} keeps the base, which has none")
        elif shared_tensors.stored_name("base", name) is not None:
            output.names.append(name)
        else:
            output.faults.append(
                f"{holders[0]}: has {name}, which the base lacks; leave it out with a rule "
                f"{{tensors: '^{name}$', use: base}}, or take it with use: {holders[0]}"
            )
    return output


class Choices:
    """The part of a recipe that decides each tensor of the output: its own method, a rule, or an entry of `layers`."""

    def __init__(self, recipe: Recipe, blocks: BlockMap) -> None:
        self.recipe, self.blocks = recipe, blocks
        choices = recipe.choices()
        self._groups = {id(choice): group for group, choice in enumerate(choices.values())}
        self._names = [choice_name(path) for path in choices]

    def of(self, name: str, kinds: TensorKinds) -> Rule | Layer | None:
        """The first rule that matches a tensor, or an entry of `layers`; None where the recipe's own method is meant.

        A block that `layers` copy is copied whole, whatever rules say. In a recipe without a method, the tensors behind
        the blocks follow the last entry, and all others outside the blocks the first.
        """
        block = self.blocks.block(name)
        if block is not None and self.blocks.copies(name):
            return block.layer
        rule = next((rule for rule in self.recipe.rules if rule.matches(name, kinds.kind(name))), None)
        if rule is not None:
            return rule
        if block is not None:
            return block.layer if block.layer.has_method else None
        if self.recipe.has_method:
            return None
        is_behind = block_of(name) is None and kinds.depth(name) == 1
        return self.recipe.layers[-1 if is_behind else 0]

    def group(self, choice: Rule | Layer | None) -> int:
        """The number of a choice among all of the recipe's; 0 is its own method."""
        return 0 if choice is None else self._groups[id(choice)]

    def name(self, choice: Rule | Layer | None) -> str:
        """The words for a choice: recipe, rule 2 or layers 1."""
        return self._names[self.group(choice)]

    def models(self, name: str, choice: Rule | Layer | None) -> Sequence[str]:
        """The models that have a part in a tensor: those of its block, or of the entry that it follows, or all."""
        block = self.blocks.block(name)
        if block is not None:
            return tuple(block.sources)
        return ("base", *(self.recipe.experts if choice is None else self.recipe.experts_of(choice)))
