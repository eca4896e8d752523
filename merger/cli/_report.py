"""Tables for people and objects for machines: plans and methods."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

import merger.methods  # noqa: F401 registers every method
from merger.engine.preflight import Forecast
from merger.errors import RecipeError, nearest
from merger.pipeline.registry import ENTRIES, SCORES, Entry, Stage, checked, parameters, schema, written
from merger.pipeline.stages import expand
from merger.planning.plan import Plan, TensorPlan

if TYPE_CHECKING:
    from rich.console import Console

# --- plans ----------------------------------------------------------------------------------------


def action(plan: Plan, tensor: TensorPlan) -> str:
    """What happens to a tensor, in a few words."""
    if not tensor.stages:
        return f"copy from {tensor.source}"
    chosen = plan.recipe if tensor.group == 0 else plan.recipe.rules[tensor.group - 1]
    names = "+".join(next(iter(written(stage))) for stage in chosen.stages)
    return names if tensor.group == 0 else f"{names} (rule {tensor.group})"


def groups(plan: Plan) -> dict[tuple[str, str, str, str, str], int]:
    """How many tensors share a name (numbers aside), shape, dtype, kind and action; in canonical order."""
    return dict(
        Counter(
            (
                re.sub(r"(?<![a-zA-Z_])\d+(?=\.|$)", "*", tensor.name),
                "x".join(map(str, tensor.info.shape)) or "scalar",
                tensor.info.dtype,
                tensor.kind,
                action(plan, tensor),
            )
            for tensor in plan.tensors
        )
    )


def plan_json(plan: Plan, forecast: Forecast) -> dict[str, Any]:
    """The plan as one object."""
    keys = ("tensors", "shape", "dtype", "kind", "action")
    return {
        "groups": [{**dict(zip(keys, key, strict=True)), "count": count} for key, count in groups(plan).items()],
        "tensors": len(plan.tensors),
        "experts": list(plan.recipe.experts),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "calibrated": plan.calibrated,
        "dropped": {label: dict(names) for label, names in plan.dropped.items() if names},
        "notes": list(plan.notes),
        **asdict(forecast),
    }


def print_plan(plan: Plan, forecast: Forecast, console: Console) -> None:
    """The plan as a table, then what it costs."""
    table = _table("tensors", "count", "shape", "dtype", "kind", "action")
    for (name, shape, dtype, kind, what), count in groups(plan).items():
        _row(table, name, count, shape, dtype, kind, what)
    console.print(table)
    for label, names in plan.dropped.items():
        for name, why in names.items():
            console.print(f"dropped from {label}: {name}: {why}", markup=False, soft_wrap=True)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    gigabytes = 1e9
    console.print(
        f"reads {plan.bytes_read / gigabytes:.2f} GB"
        f"{' (more than once where the whole model is ranked)' if forecast.passes_over_model else ''}, "
        f"writes {plan.bytes_written / gigabytes:.2f} GB of {forecast.disk_free / gigabytes:.1f} GB free; "
        f"needs about {forecast.memory / gigabytes:.2f} GB of memory",
        markup=False,
    )
    if forecast.devices is not None:
        console.print(f"slices are dealt out to {', '.join(forecast.devices)}", markup=False, soft_wrap=True)
    if forecast.kept_grams:
        console.print(
            f"Gram matrices are made and dropped block by block; merger calibrate --gram would keep them, "
            f"in at most {forecast.kept_grams / gigabytes:.2f} GB",
            markup=False,
            soft_wrap=True,
        )


# --- methods --------------------------------------------------------------------------------------


def methods_json(name: str | None) -> Any:
    """One entry, or all of them by kind."""
    if name is not None:
        return _described(_find(name))
    return {kind: [_described(entry) for entry in entries] for kind, entries in _by_kind()}


def print_methods(name: str | None, console: Console) -> None:
    """One entry in full, or a table of each kind."""
    if name is None:
        for kind, entries in _by_kind():
            table = _table(f"{kind}s", "what it does")
            for entry in entries:
                _row(table, entry.name, entry.summary)
            console.print(table)
        return
    entry = _find(name)
    console.print(f"[bold]{entry.name}[/] ({entry.kind})")
    console.print(inspect.getdoc(entry.function) or "", markup=False)
    if entry.paper:
        console.print(f"paper: {entry.paper}", markup=False)
    expansion = _expansion(entry)
    if expansion:
        console.print("\nexpands to:")
        for stage in expansion:
            console.print(f"  - {_one_line(stage)}", markup=False, soft_wrap=True)
    table = _table("parameter", "default", "takes")
    for parameter, facts in _parameters(entry).items():
        _row(table, parameter, facts["default"], facts["takes"])
    console.print(table if table.row_count else "no parameters")


def _by_kind() -> Iterable[tuple[str, list[Entry]]]:
    for kind in ("method", "sparsifier", "merger", "pack", "filter", "scale"):
        yield kind, [entry for entry in ENTRIES.values() if entry.kind == kind]
    yield "score", list(SCORES.values())


def _find(name: str) -> Entry:
    table = {**SCORES, **ENTRIES}
    if name not in table:
        raise RecipeError(f"there is no method, stage or score {name!r}; {nearest(name, table)}")
    return table[name]


def _described(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "summary": entry.summary,
        "paper": entry.paper,
        "parameters": _parameters(entry),
        "expands_to": [written(stage) for stage in _expansion(entry)],
    }


def _expansion(entry: Entry) -> list[Stage]:
    """The stages of a named method for a weight matrix of three experts, with default parameters."""
    if entry.kind != "method":
        return []
    try:
        return expand(checked(entry.name, {}), "linear", ("a", "b", "c"))
    except ValidationError:  # a parameter has no default, or one that is not valid
        return []


def _parameters(entry: Entry) -> dict[str, dict[str, str]]:
    defaults = _defaults(entry)
    found = {}
    for name, (annotation, _) in parameters(entry.function).items():
        said = name.rstrip("_")
        default = defaults[said]
        found[said] = {
            "default": next(iter(default)) if isinstance(default, dict) else default,
            "takes": _takes(annotation),
        }
    return found


def _defaults(entry: Entry) -> dict[str, Any]:
    """Each parameter's default as a recipe writes it; as it stands in the file if one is missing or not valid."""
    try:
        return schema(entry)().model_dump(mode="json", by_alias=True)
    except ValidationError:
        defaults = {name.rstrip("_"): default for name, (_, default) in parameters(entry.function).items()}
        return {name: "(none)" if default is ... else str(default) for name, default in defaults.items()}


def _takes(annotation: Any) -> str:
    """A few words on what a recipe may write for a parameter."""
    from merger.pipeline import parameters as kinds
    from merger.pipeline.registry import Inner, Score

    known = {
        kinds.Number: "a number, or a list over depth",
        kinds.Share: "a share in [0, 1], or a list over depth",
        kinds.Numbers: "a number, a list over depth, or a map by expert",
        kinds.Shares: "a share in [0, 1], a list over depth, or a map by expert",
        kinds.SharesOrAuto: "auto, a share, a list over depth, or a map by expert",
        Score: f"a score: {', '.join(SCORES)}",
        Inner: "a method, or {method: {parameter: value}}",
    }
    for kind, words in known.items():
        if annotation == kind:
            return words
    if kinds.is_order(annotation):
        return "rotation, listed, a list of experts, {first: x} or {last: x}"
    choices = getattr(annotation, "__args__", ())
    if annotation is bool:
        return "true or false"
    if choices and all(isinstance(each, str) for each in choices):
        return " | ".join(choices)
    return "a whole number"


def _one_line(stage: Stage) -> str:
    """A stage as a recipe's pipeline has it."""
    import yaml

    ((name, given),) = written(stage).items()
    parameters = yaml.safe_dump(given, default_flow_style=True, sort_keys=False, width=10**6).strip()
    return f"{name}: {parameters}" if given else name


def _table(*headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(
            heading,
            justify="right" if heading == "count" else "left",
            overflow="fold",
            no_wrap=i == 0 and len(headings) == 2,
        )
    return table


def _row(table: Any, *cells: object) -> None:
    """Adds a row of plain text: a tensor's name may look like markup."""
    from rich.text import Text

    table.add_row(*(Text(str(cell)) for cell in cells))
