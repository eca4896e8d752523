"""From what a recipe writes under method or pipeline to stages, with all that is wrong on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from pydantic import ValidationError

import merger.methods  # noqa: F401 registers every method
from merger.errors import nearest
from merger.pipeline.parameters import Number, Pinned, Place, resolve
from merger.pipeline.registry import ENTRIES, SCORES, Stage, checked, nested_parameter, parameter_names, parameters
from merger.pipeline.stages import bind, expand
from merger.recipe.document import KeyPath
from merger.recipe.faults import said


def stages_of(
    node: Mapping[str, Any], path: KeyPath, experts: Mapping[str, Number], faults: list[tuple[KeyPath, str]]
) -> list[Stage]:
    """The stages of one choice for experts of these weights; what is wrong with it goes to ``faults``."""
    asked = [key for key in ("method", "pipeline", "use") if node.get(key) is not None]
    if len(asked) != 1:
        expected = "one of method, pipeline, use" if path else "a method or a pipeline"
        faults.append(((*path, *asked[-1:]), f"expected {expected}, found {' and '.join(asked) or 'none'}"))
        return []
    if asked == ["use"]:
        if isinstance(node["use"], str) and node["use"] not in ("base", *experts):
            near = nearest(node["use"], ["base", *experts])
            faults.append(((*path, "use"), f"there is no expert {node['use']!r}; {near}"))
        return []
    before = len(faults)
    stages = []
    for where, name, given in _named(node, path, faults):
        table = {**ENTRIES, **SCORES} if asked == ["method"] else stage_table()
        if name not in table:
            here = (*path, "method") if asked == ["method"] else where
            faults.append((here, _no_such(name, table, asked[0])))
            continue
        try:
            stages.append(checked(name, given))
        except ValidationError as error:
            faults += [
                ((*where, *inner), message) for inner, message in said(error, partial(_keys, name, given), given)
            ]
            continue
        faults += [((*where, key), message) for key, message in _unsuited(stages[-1], experts)]
    if len(faults) == before and experts and (stages or isinstance(node.get("pipeline"), list)):
        faults += _sequence_faults(stages, path, asked[0], experts)
    return stages


def _unsuited(stage: Stage, experts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Parameters that name no expert of this recipe, or leave one out."""
    for name, (annotation, _) in parameters(stage.func).items():
        try:
            if stage.keywords[name] != "auto":
                resolve(annotation, stage.keywords[name], Place(tuple(experts)))
        except ValueError as error:
            yield name.rstrip("_"), str(error)


def stage_table() -> dict[str, Any]:
    """What may stand in a pipeline: every stage, and every score."""
    return {**{name: e for name, e in ENTRIES.items() if e.kind != "method"}, **SCORES}


def _no_such(name: str, table: Mapping[str, Any], where: str) -> str:
    if where == "pipeline" and name in ENTRIES:
        return f"{name} is a method; a pipeline is made of stages (`merger methods {name}` shows which)"
    return f"there is no {'method' if where == 'method' else 'stage'} {name!r}; {nearest(name, table)}"


def _named(
    node: Mapping[str, Any], path: KeyPath, faults: list[tuple[KeyPath, str]]
) -> Iterator[tuple[KeyPath, str, dict[str, Any]]]:
    """Where each stage's parameters stand, its name, and the parameters."""
    if node.get("pipeline") is None:
        given = node.get("parameters") or {}
        if isinstance(node["method"], str) and isinstance(given, Mapping):
            yield (*path, "parameters"), node["method"], dict(given)
        return
    if node.get("parameters"):
        faults.append(((*path, "parameters"), "belongs to a method; in a pipeline each stage has its own"))
    for i, each in enumerate(node["pipeline"] if isinstance(node["pipeline"], list) else []):
        here = (*path, "pipeline", i)
        if isinstance(each, str):
            yield here, each, {}
        elif isinstance(each, Mapping) and len(each) == 1 and isinstance(next(iter(each)), str):
            ((name, given),) = each.items()
            if given is None or isinstance(given, Mapping):
                yield (*here, name), name, dict(given or {})
            else:
                faults.append(((*here, name), "expected parameters, as in {density: 0.5}"))
        else:
            faults.append((here, "expected a stage's name, or {stage: {parameter: value}}"))


def _sequence_faults(
    stages: Sequence[Stage], path: KeyPath, where: str, experts: Mapping[str, Number]
) -> list[tuple[KeyPath, str]]:
    """Whether the stages make one task vector of K, and their parameters go together for these experts."""
    here = (*path, where)
    found: list[str] = []
    for kind in ("linear", "vector", "embedding", "head"):
        for depth in (Fraction(0), Fraction(1, 2), Fraction(1)):
            try:
                weights = tuple(resolve(Number, weight, Place((), depth=depth)) for weight in experts.values())
                place = Place(tuple(experts), weights, depth)
                expanded = [each for stage in stages for each in expand(stage, kind, place.experts)]
                bounds = [bind(stage, place) for stage in expanded]
            except ValueError as error:
                found.append(str(error))
                continue
            found += _order_faults([bound.entry.kind for bound in bounds])
            found += [
                f"{b.entry.name} merges exactly {b.entry.experts} experts, not {len(experts)}"
                for b in bounds
                if b.entry.experts not in (None, len(experts))
            ]
            by_block = [f"{b.entry.name} takes {s.name}" for b in bounds for s in b.inputs if s.granularity == "block"]
            if by_block and any(s.keywords.get("scope") == "global" for s in expanded):
                found.append(f"scope: global ranks the whole model at once, but {by_block[0]}, made block by block")
            found += [
                f"{b.entry.name} merges at least {b.entry.fewest} experts, not {len(experts)}"
                for b in bounds
                if len(experts) < b.entry.fewest
            ]
            found += [
                f"scope: global ranks the whole model at once, so {name} cannot vary over depth"
                for stage in expanded
                if stage.keywords.get("scope") == "global"
                for name, value in stage.keywords.items()
                if _varies(value)
            ]
    return [(here, message) for message in dict.fromkeys(found)]


def _varies(value: Any) -> bool:
    several = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(each, list) and isinstance(each[0], Fraction) for each in several)


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


def _keys(name: str, given: Mapping[str, Any], path: KeyPath) -> set[str]:
    """The keys that are valid at ``path`` of the parameters that were given to the stage ``name``."""
    if not path:
        return parameter_names(name)
    if path[0] == "score":  # written as {name: {parameter: value}}
        return {each.rstrip("_") for each in parameters(SCORES[next(iter(given["score"]))].function)}
    nested = nested_parameter(ENTRIES[name].function) if name in ENTRIES else None
    if nested is not None and path[0] == nested[0]:
        return parameter_names(next(iter(given[nested[0]])))
    return set(Pinned.model_fields)
