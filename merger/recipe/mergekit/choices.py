"""A method of mergekit with its parameters, as the method or the pipeline of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from merger.recipe.mergekit.references import Reference
from merger.recipe.mergekit.settings import CONV1D, MOST_FILTERS, Group, Settings, choose_rules, rule_condition
from merger.recipe.mergekit.table import Method


def absence_parameter(method: Method) -> str | None:
    """Returns the parameter whose value 0 excludes a model."""
    return next((name for name in ("weight", "scale") if name in method.model_parameters), None)


def choice_of(
    method: Method, settings: Settings, names: Mapping[Reference, str], space: str, group: Group
) -> dict[str, Any]:
    """The method and its parameters, or the pipeline, for the tensors of a group."""
    values: dict[str, Any] = {"space": space, "stored_transposed": CONV1D in group}
    for name, default in method.merge_parameters.items():
        read = settings.switch if isinstance(default, bool) else settings.number
        values[name] = read(name, default, group)
    for name, default in method.model_parameters.items():
        missing = 0 if name == absence_parameter(method) else None
        values[name] = {
            expert: settings.number(name, default, group, model, missing) for model, expert in names.items()
        }
    try:
        stages = [(name, parameters) for stage in method.stages(values) for name, parameters in stage.items()]
    except ValueError as error:
        settings.faults.append((("merge_method",), str(error)))
        return {}
    entries = [(name, {key: _collapse(value) for key, value in parameters.items()}) for name, parameters in stages]
    if len(entries) > 1:
        return {"pipeline": [{name: parameters} for name, parameters in entries]}
    ((name, parameters),) = entries
    return {"method": name, "parameters": parameters} if parameters else {"method": name}


def _collapse(value: Any) -> Any:
    """Replaces a map with equal values for all experts by that value."""
    if isinstance(value, dict) and all(entry == value[next(iter(value))] for entry in value.values()):
        return next(iter(value.values()))
    return value


def recipe_choices(method: Method, settings: Settings, names: Mapping[Reference, str], space: str) -> dict[str, Any]:
    """The method of most tensors, and the rules of the others."""
    conditions = settings.conditions(method.parameters)
    if len(conditions) > MOST_FILTERS + 2:
        settings.faults.append((("parameters",), f"more than {MOST_FILTERS} filters have no equivalent"))
        return {}
    main, rules = choose_rules(conditions, partial(choice_of, method, settings, names, space))
    if not rules:
        return main
    return {**main, "rules": [{**rule_condition(group), **choice} for group, choice in rules]}
