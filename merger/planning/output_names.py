"""The tensors of a merge's output: the base's, and those that a rule or an untied head adds from an expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from merger.checkpoint.tensor_kinds import TensorKinds
from merger.planning.shared_tensors import SharedTensors
from merger.recipe.recipe import Recipe
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


def output_names(recipe: Recipe, kinds: Mapping[str, TensorKinds], shared_tensors: SharedTensors) -> OutputNames:
    """Returns the names of the output: the base's, then those of experts' tensors that rules or copies add.

    An expert's tensor that the base lacks is added, dropped with a reason, or a fault.
    """
    output = OutputNames(list(kinds["base"].tensors), {label: {} for label in kinds})
    extra = dict.fromkeys(n for kind in kinds.values() for n in kind.tensors if n not in kinds["base"].tensors)
    for name in extra:
        holders = [label for label, kind in kinds.items() if name in kind.tensors]
        rule = matching_rule(recipe, name, kinds[holders[0]])
        if original := shared_tensors.repeated(name, holders):
            output.repeated[name] = original
            output.drop(name, holders, f"is {original}, stored once more")
        elif rule is not None and rule.use in holders:
            output.names.append(name)
        elif rule is not None and rule.use == "base":
            number = recipe.rules.index(rule) + 1
            output.drop(name, holders, f"rule {number} keeps the base, which has none")
        elif shared_tensors.stored_name("base", name) is not None:
            output.names.append(name)
        else:
            output.faults.append(
                f"{holders[0]}: has {name}, which the base lacks; leave it out with a rule "
                f"{{tensors: '^{name}$', use: base}}, or take it with use: {holders[0]}"
            )
    return output


def matching_rule(recipe: Recipe, name: str, kinds: TensorKinds) -> Rule | None:
    """The first rule that matches a tensor, None where the recipe's own method is meant."""
    return next((rule for rule in recipe.rules if rule.matches(name, kinds.kind(name))), None)
