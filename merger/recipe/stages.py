"""Builds the stages of a recipe's method or pipeline, and collects their faults."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from pydantic import ValidationError

import merger.methods  # noqa: F401 registers every method
from merger.errors import nearest
from merger.pipeline.parameters import Number, Pinned, Place, check_names, resolve
from merger.pipeline.registry import (
    ENTRIES,
    SCORES,
    Stage,
    annotations_of,
    checked,
    nested_parameter,
    parameter_names,
    parameters,
)
from merger.pipeline.stages import bind, expand
from merger.recipe.document import KeyPath
from merger.recipe.faults import translate_errors


def written_choices(raw: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Any]]:
    """Yields the parts of a document that must have a method, with their keys.

    An entry of `layers` without one copies or takes the recipe's; with `layers` the recipe itself may have none.
    """
    if _has_method(raw) or not raw.get("layers"):
        yield (), raw
    for key in ("rules", "layers"):
        entries = raw[key] if isinstance(raw.get(key), list) else []
        yield from (((key, i), entry) for i, entry in enumerate(entries) if key == "rules" or _has_method(entry))


def _has_method(node: Any) -> bool:
    return isinstance(node, Mapping) and any(node.get(key) is not None for key in ("method", "pipeline", "parameters"))


def stages_of(
    node: Mapping[str, Any], path: KeyPath, experts: Mapping[str, Number], faults: list[tuple[KeyPath, str]]
) -> list[Stage]:
    """Returns the stages of one choice for experts with these weights; appends its faults to ``faults``."""
    keys = [key for key in ("method", "pipeline", "use") if node.get(key) is not None]
    if len(keys) != 1:
        expected = "one of method, pipeline, use" if path else "a method or a pipeline"
        faults.append(((*path, *keys[-1:]), f"expected {expected}, found {' and '.join(keys) or 'none'}"))
        return []
    if keys == ["use"]:
        if isinstance(node["use"], str) and node["use"] not in ("base", *experts):
            suggestion = nearest(node["use"], ["base", *experts])
            faults.append(((*path, "use"), f"there is no expert {node['use']!r}; {suggestion}"))
        return []
    fault_count = len(faults)
    stages = []
    for place, name, arguments in _written_stages(node, path, faults):
        table = {**ENTRIES, **SCORES} if keys == ["method"] else stage_table()
        if name not in table:
            fault_path = (*path, "method") if keys == ["method"] else place
            faults.append((fault_path, _unknown_name(name, table, keys[0])))
            continue
        try:
            stages.append(checked(name, arguments))
        except ValidationError as error:
            parameter_faults = list(translate_errors(error, partial(_valid_keys, name, arguments), arguments))
            parameter_faults += [((key,), message) for key, message in _name_faults(name, arguments, experts)]
            faults += [((*place, *inner), message) for inner, message in parameter_faults]
            continue
        faults += [((*place, key), message) for key, message in _expert_faults(stages[-1], experts)]
    if len(faults) == fault_count and experts and (stages or isinstance(node.get("pipeline"), list)):
        faults += _sequence_faults(stages, path, keys[0], experts)
    return stages


def _expert_faults(stage: Stage, experts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields the parameters that name an unknown expert or omit one, each with the fault."""
    for name, (annotation, _) in parameters(stage.func).items():
        try:
            if stage.keywords[name] != "auto":
                resolve(annotation, stage.keywords[name], Place(tuple(experts)))
        except ValueError as error:
            yield name.rstrip("_"), str(error)


def _name_faults(
    stage_name: str, arguments: Mapping[str, Any], experts: Mapping[str, Number]
) -> Iterator[tuple[str, str]]:
    """Yields the written parameters that name an unknown expert or omit one, each with the fault."""
    annotations = annotations_of(stage_name)
    for key in arguments.keys() & annotations.keys():
        try:
            check_names(annotations[key], arguments[key], list(experts))
        except ValueError as error:
            yield key, str(error)


def stage_table() -> dict[str, Any]:
    """Returns the valid entries of a pipeline: every stage, and every score."""
    return {**{name: e for name, e in ENTRIES.items() if e.kind != "method"}, **SCORES}


def _unknown_name(name: str, table: Mapping[str, Any], key: str) -> str:
    if key == "pipeline" and name in ENTRIES:
        return f"{name} is a method; a pipeline is made of stages (`merger methods {name}` shows which)"
    return f"there is no {'method' if key == 'method' else 'stage'} {name!r}; {nearest(name, table)}"


def _written_stages(
    node: Mapping[str, Any], path: KeyPath, faults: list[tuple[KeyPath, str]]
) -> Iterator[tuple[KeyPath, str, dict[str, Any]]]:
    """Yields the path of each stage's parameters, the stage's name, and the parameters."""
    if node.get("pipeline") is None:
        arguments = node.get("parameters") or {}
        if isinstance(node["method"], str) and isinstance(arguments, Mapping):
            yield (*path, "parameters"), node["method"], dict(arguments)
        return
    if node.get("parameters"):
        faults.append(((*path, "parameters"), "belongs to a method; in a pipeline each stage has its own"))
    for i, entry in enumerate(node["pipeline"] if isinstance(node["pipeline"], list) else []):
        place = (*path, "pipeline", i)
        if isinstance(entry, str):
            yield place, entry, {}
        elif isinstance(entry, Mapping) and len(entry) == 1 and isinstance(next(iter(entry)), str):
            ((name, arguments),) = entry.items()
            if arguments is None or isinstance(arguments, Mapping):
                yield (*place, name), name, dict(arguments or {})
            else:
                faults.append(((*place, name), "expected parameters, as in {density: 0.5}"))
        else:
            faults.append((place, "expected a stage's name, or {stage: {parameter: value}}"))


def _sequence_faults(
    stages: Sequence[Stage], path: KeyPath, key: str, experts: Mapping[str, Number]
) -> list[tuple[KeyPath, str]]:
    """Returns the faults of a sequence: stages that do not make one task vector, parameters that conflict."""
    place = (*path, key)
    messages: list[str] = []
    for kind in ("linear", "vector", "embedding", "head"):
        for depth in (Fraction(0), Fraction(1, 2), Fraction(1)):
            try:
                weights = tuple(resolve(Number, weight, Place((), depth=depth)) for weight in experts.values())
                merge_place = Place(tuple(experts), weights, depth)
                expanded = [expansion for stage in stages for expansion in expand(stage, kind, merge_place.experts)]
                bounds = [bind(stage, merge_place) for stage in expanded]
            except ValueError as error:
                messages.append(str(error))
                continue
            messages += _order_faults([bound.entry.kind for bound in bounds])
            messages += [
                f"{b.entry.name} merges exactly {b.entry.experts} experts, not {len(experts)}"
                for b in bounds
                if b.entry.experts not in (None, len(experts))
            ]
            messages += [
                f"{b.entry.name}: its coefficients are learned of whole task vectors, so no stage can come before it"
                for b in bounds[1:]
                if any(item.of_task_vectors for item in b.inputs)
            ]
            by_block = [f"{b.entry.name} takes {s.name}" for b in bounds for s in b.inputs if s.granularity == "block"]
            messages += [
                f"{b.entry.name} takes {item.name}, made for the whole model before the merge, but {by_block[0]}, made "
                "block by block during it; take one of them"
                for b in bounds
                for item in b.inputs
                if by_block and item.needs_gradients and item.granularity == "model"
            ]
            if by_block and any(s.keywords.get("scope") == "global" for s in expanded):
                messages.append(f"scope: global ranks the whole model at once, but {by_block[0]}, made block by block")
            messages += [
                f"{b.entry.name} merges at least {b.entry.fewest} experts, not {len(experts)}"
                for b in bounds
                if len(experts) < b.entry.fewest
            ]
            messages += [
                f"scope: global ranks the whole model at once, so {name} cannot vary over depth"
                for stage in expanded
                if stage.keywords.get("scope") == "global"
                for name, value in stage.keywords.items()
                if _varies_over_depth(value)
            ]
    return [(place, message) for message in dict.fromkeys(messages)]


def _varies_over_depth(argument: Any) -> bool:
    values = argument.values() if isinstance(argument, Mapping) else [argument]
    return any(isinstance(value, list) and isinstance(value[0], Fraction) for value in values)


def _order_faults(kinds: Sequence[str]) -> list[str]:
    mergers = [i for i, kind in enumerate(kinds) if kind in ("merger", "pack")]
    if len(mergers) != 1:
        mergers_known = ", ".join(name for name, entry in ENTRIES.items() if entry.kind == "merger")
        return [f"expected exactly one merger among the stages, found {len(mergers)}; mergers are {mergers_known}"]
    if "pack" in kinds[:-1]:
        return ["a pack makes more than one model, so no stage can follow it"]
    if "filter" in kinds[: mergers[0]]:
        return ["a filter stands before the merger; it keeps part of what was merged, so it must come after"]
    if "sparsifier" in kinds[mergers[0] :]:
        return ["a sparsifier stands after the merger; it thins each expert's task vector, so it must come before"]
    return []


def _valid_keys(name: str, arguments: Mapping[str, Any], path: KeyPath) -> set[str]:
    """Returns the valid keys at ``path`` of the parameters of the stage ``name``."""
    if not path:
        return parameter_names(name)
    if path[0] == "score":  # written as {name: {parameter: value}}
        return {parameter.rstrip("_") for parameter in parameters(SCORES[next(iter(arguments["score"]))].function)}
    nested = nested_parameter(ENTRIES[name].function) if name in ENTRIES else None
    if nested is not None and path[0] == nested[0]:
        return parameter_names(next(iter(arguments[nested[0]])))
    return set(Pinned.model_fields)
