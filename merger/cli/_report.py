"""Tables for people and objects for machines: plans and methods."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

import merger.methods  # noqa: F401 registers every method
from merger.calibration.text_forecast import CACHED, TextForecast
from merger.cli._parameter_words import takes
from merger.display import Cell, Column, Row, Table, text_row
from merger.display.terminal import fits, print_table, print_text
from merger.engine.preflight import Forecast
from merger.errors import RecipeError, nearest
from merger.pipeline.registry import ENTRIES, SCORES, Entry, Stage, checked, parameters, schema, stage_names, written
from merger.pipeline.stages import expand
from merger.planning.plan import Plan, TensorPlan
from merger.planning.sample import SampledChange, sample_notes
from merger.recipe.calibration_faults import inputs_of
from merger.recipe.recipe import choice_name
from merger.recipe.recommendations import RECOMMENDATIONS

if TYPE_CHECKING:
    from rich.console import Console

# --- plans ----------------------------------------------------------------------------------------


def method_names(plan: Plan) -> list[str]:
    """The stages of the recipe's own method, then those of its rules and layers, as the table of a plan names them."""
    names = {path: stage_names(choice.stages) for path, choice in plan.recipe.choices().items()}
    return [f"{name} ({choice_name(path)})" if path else name for path, name in names.items()]


def groups(plan: Plan) -> dict[tuple[str, str, str, str, str], int]:
    """How many tensors share a name (numbers aside), shape, dtype, kind and action; in canonical order."""
    methods = method_names(plan)
    return dict(
        Counter(
            (
                ".".join("*" if part.isdigit() else part for part in tensor.name.split(".")),
                "x".join(map(str, tensor.info.shape)) or "scalar",
                tensor.info.dtype,
                tensor.kind,
                _action(tensor, methods),
            )
            for tensor in plan.tensors
        )
    )


def _action(tensor: TensorPlan, methods: Sequence[str]) -> str:
    """What happens to a tensor, in a few words."""
    if tensor.factors is None:
        return methods[tensor.group] if tensor.stages else _copy_text(tensor)
    if not tensor.factors:
        return "not in the adapter" if tensor.stages else "as in the base"
    (rank, _), *_ = (info.shape for info in tensor.factors.values())
    return f"{methods[tensor.group]}, rank {rank}"


def _copy_text(tensor: TensorPlan) -> str:
    scale = "" if tensor.scale == 1 else f", times {tensor.scale:g}"
    return f"copy from {tensor.source}{scale}"


def plan_json(
    plan: Plan, forecast: Forecast, changes: Mapping[str, SampledChange], texts: Mapping[str, TextForecast]
) -> dict[str, Any]:
    """The plan as one object."""
    keys = ("tensors", "shape", "dtype", "kind", "action")
    return {
        "groups": [{**dict(zip(keys, key, strict=True)), "count": count} for key, count in groups(plan).items()],
        "tensors": len(plan.tensors),
        "experts": list(plan.recipe.experts),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "calibrated": bool(plan.inputs),
        "dropped": {label: dict(names) for label, names in plan.dropped.items() if names},
        "changes": {expert: asdict(change) for expert, change in changes.items()},
        "texts": {expert: asdict(text) for expert, text in texts.items()},
        "notes": [*plan.notes, *sample_notes(changes)],
        **asdict(forecast),
    }


def print_plan(
    plan: Plan,
    forecast: Forecast,
    changes: Mapping[str, SampledChange],
    texts: Mapping[str, TextForecast],
    console: Console,
) -> None:
    """Prints the plan as a table, the size of the experts' changes, and the cost of the merge."""
    table = plan_table(plan)
    print_table(table if fits(table, console.width) else _by_block(table), console)
    for line in _dropped_lines(plan):
        print_text(line, console)
    _print_changes(changes, console)
    for note in (*plan.notes, *sample_notes(changes)):
        print_text(f"note: {note}", console)
    for line in (*_text_lines(texts), *_cost(plan, forecast)):
        print_text(line, console)


def plan_table(plan: Plan) -> Table:
    """A row for each group of tensors."""
    headings = ("tensors", "count", "shape", "dtype", "kind", "action")
    columns = [Column(heading, "right" if heading == "count" else "left") for heading in headings]
    rows = [text_row(name, count, *facts) for (name, *facts), count in groups(plan).items()]
    return Table(columns, rows)


def _by_block(table: Table) -> Table:
    """The narrow form of the plan's table: names within a block are below the block's name, and indented."""
    rows: list[Row] = []
    block = ""
    for row in table.rows:
        name = row.cells[0].text
        prefix, star, rest = name.partition("*.")
        if star and prefix != block:
            rows.append(text_row(f"{prefix}*"))
        block = prefix if star else ""
        rows.append(replace(row, cells=[Cell(f"  {rest}" if star else name), *row.cells[1:]]))
    return replace(table, rows=rows)


def _cost(plan: Plan, forecast: Forecast) -> Iterator[str]:
    """Sentences on bytes, memory and devices."""
    gigabytes = 1e9
    yield (
        f"reads {plan.bytes_read / gigabytes:.2f} GB"
        f"{' (more than once where the whole model is ranked)' if forecast.passes_over_model else ''}, "
        f"writes {plan.bytes_written / gigabytes:.2f} GB of {forecast.disk_free / gigabytes:.1f} GB free; "
        f"needs about {forecast.memory / gigabytes:.2f} GB of memory"
    )
    if forecast.devices is not None:
        yield f"slices are dealt out to {', '.join(forecast.devices)}"
    if forecast.cached:
        yield (
            f"what backward passes find is as large as the experts in float32: {forecast.cached / gigabytes:.2f} GB in "
            "the cache, unless calibration.stats names files of it"
        )
    if forecast.kept_grams:
        yield (
            "Gram matrices are made and dropped block by block; merger calibrate --gram would keep them, "
            f"in at most {forecast.kept_grams / gigabytes:.2f} GB"
        )


LISTED = 8
"""The most tensors left out for one reason that are named one by one."""


def _dropped_lines(plan: Plan) -> Iterator[str]:
    """Yields the tensors of the inputs that are left out; many with one reason in one line."""
    for label, names in plan.dropped.items():
        counts = Counter(names.values())
        yield from (
            f"dropped from {label}: {name}: {reason}" for name, reason in names.items() if counts[reason] <= LISTED
        )
        yield from (
            f"dropped from {label}: {count} tensors: {reason}" for reason, count in counts.items() if count > LISTED
        )


def _text_lines(texts: Mapping[str, TextForecast]) -> Iterable[str]:
    """A line on the text of each expert whose model will run, and one on what that costs."""
    for expert, text in texts.items():
        files = ", ".join(text.sources)
        amount = "a data set that a plan does not read"
        if text.samples is not None:
            amount = f"{text.samples:,} samples, {text.tokens:,} tokens"
        yield f"text of {expert}: {files}: {amount}; statistics {text.statistics}"
    tokens = [text.tokens or 0 for text in texts.values() if text.statistics != CACHED]
    if sum(tokens):
        yield f"calibration runs {sum(tokens):,} tokens in all, each text through its own model"


def _print_changes(changes: Mapping[str, SampledChange], console: Console) -> None:
    if not changes:
        return
    columns = [Column("expert"), Column("|delta| / |base|"), Column("weights changed")]
    rows = [
        text_row(expert, f"{change.relative_size:.4f}", f"{change.changed:.1%}") for expert, change in changes.items()
    ]
    print_table(Table(columns, rows), console)
    print_text("of a sample of the matrices; fine-tunes are below 0.1, unrelated models at 1 and above", console)


# --- methods --------------------------------------------------------------------------------------


def methods_json(name: str | None) -> Any:
    """One entry, or all of them by kind."""
    if name is not None:
        return _described(_find(name))
    return {kind: [_described(entry) for entry in entries] for kind, entries in _by_kind()}


def print_methods(name: str | None, console: Console) -> None:
    """One entry in full, or what to start with and a table of each kind."""
    if name is None:
        _print_recommendations(console)
        for kind, entries in _by_kind():
            columns = [Column(f"{kind}s"), Column("needs"), Column("what it does", is_prose=True)]
            rows = [text_row(entry.name, ", ".join(_needs(entry)), entry.summary) for entry in entries]
            print_table(Table(columns, rows), console)
        return
    entry = _find(name)
    console.print(f"[bold]{entry.name}[/] ({entry.kind})")
    for line in _paragraphs(inspect.getdoc(entry.function) or ""):
        print_text(line, console)
    if entry.paper:
        print_text(f"paper: {entry.paper}", console)
    if entry.package:
        print_text(f"package: {entry.package}", console)
    if needs := _needs(entry):
        print_text(f"needs: {', '.join(needs)}", console)
    expansion = _expansion(entry)
    if expansion:
        console.print("\nexpands to:")
        for stage in expansion:
            print_text(f"  - {_one_line(stage)}", console)
    rows = [text_row(parameter, facts["default"], facts["takes"]) for parameter, facts in _parameters(entry).items()]
    columns = [Column("parameter"), Column("default"), Column("takes", is_prose=True)]
    if rows:
        print_table(Table(columns, rows), console)
    else:
        print_text("no parameters", console)


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a docstring, each in one line, with an empty line between two; indented lines stay."""
    for i, paragraph in enumerate(text.split("\n\n")):
        yield from [""] if i else []
        lines = paragraph.splitlines()
        yield from lines if any(line.startswith(" ") for line in lines) else [" ".join(lines)]


def _print_recommendations(console: Console) -> None:
    """Prints the methods to start with, by what a user has."""
    console.print("[bold]Start here[/]")
    columns = [
        Column("you have, or want", is_prose=True),
        Column("method"),
        Column("kept"),
        Column("because it", is_prose=True),
    ]
    rows = [
        text_row(advice.purpose, advice.method, "-" if advice.share is None else f"{advice.share:.3f}", advice.reason)
        for advice in RECOMMENDATIONS
    ]
    print_table(Table(columns, rows), console)
    sources = ", ".join(dict.fromkeys(advice.source for advice in RECOMMENDATIONS if advice.source))
    lines = (
        f"kept: by its defaults, of three experts' gains on a 135M model ({sources}); - is not measured",
        "merger init BASE EXPERT... [--data NAME=FILE ...] writes a recipe of the first, or without text of the second",
    )
    for line in lines:
        print_text(line, console)
    console.print()


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
        "start_here": [asdict(advice) for advice in RECOMMENDATIONS if advice.method == entry.name],
        "paper": entry.paper,
        "package": None if entry.package is None else str(entry.package),
        "needs": _needs(entry),
        "parameters": _parameters(entry),
        "expands_to": [written(stage) for stage in _expansion(entry)],
    }


def _needs(entry: Entry) -> list[str]:
    """What an entry needs for a matrix beside the weights, by its defaults: text of each expert, and gradients."""
    try:
        stage = checked(entry.name, {})
    except ValidationError:  # a parameter has no default
        return []
    inputs = inputs_of([stage], ("a", "b", "c")[: entry.experts])
    words = {
        "text": any(item.needs_text for item in inputs),
        "gradients": any(item.needs_gradients for item in inputs),
    }
    return [word for word, is_needed in words.items() if is_needed]


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
    described = {}
    for name, (annotation, _) in parameters(entry.function).items():
        key = name.rstrip("_")
        default = defaults[key]
        described[key] = {
            "default": next(iter(default)) if isinstance(default, dict) else default,
            "takes": takes(annotation),
        }
    return described


def _defaults(entry: Entry) -> dict[str, Any]:
    """Each parameter's default as a recipe writes it; as it stands in the file if one is missing or not valid."""
    try:
        return schema(entry)().model_dump(mode="json", by_alias=True)
    except ValidationError:
        defaults = {name.rstrip("_"): default for name, (_, default) in parameters(entry.function).items()}
        return {name: "(none)" if default is ... else str(default) for name, default in defaults.items()}


def _one_line(stage: Stage) -> str:
    """A stage as a recipe's pipeline has it."""
    import yaml

    ((name, settings),) = written(stage).items()
    parameters = yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=10**6).strip()
    return f"{name}: {parameters}" if settings else name
