"""A first recipe for the models and texts of a user, with the method and the amount of text that are recommended."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from merger.checkpoint.folder import ADAPTER, MODEL, find_weights, local_folder
from merger.checkpoint.near_paths import names_in, near_path
from merger.checkpoint.opening import is_adapter
from merger.errors import CheckpointError, RecipeError, nearest
from merger.recipe.locations import FOLDER, TEXT_FILE, location_fault, location_from, location_path
from merger.recipe.recipe import Recipe
from merger.recipe.recommendations import SAMPLES, SAMPLES_REASON, TEXT, WEIGHTS, Recommendation
from merger.recipe.sections import expert_name, unused_expert_name


@dataclass(frozen=True)
class Starter:
    """A recipe as text, its method and experts, the files of text on this machine, and remarks on its inputs."""

    text: str
    method: str
    experts: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]


def starter_recipe(base: str, experts: Sequence[str], texts: Sequence[str], file: Path) -> Starter:
    """The recipe to write into ``file``, of a base and of experts ``[NAME=]LOCATION`` with texts ``NAME=FILE``.

    Folders and files are relative to the working folder; nothing is looked up on the Hub. RecipeError with all faults.
    """
    faults: list[str] = []
    models = _named_experts(experts, faults)
    files = _named_texts(texts, models, faults)
    faults += _repeated(base, models)
    notes = []
    inputs = [*((model, FOLDER) for model in (base, *models.values())), *((text, TEXT_FILE) for text in files.values())]
    for location, kind in dict.fromkeys(inputs):
        if fault := location_fault(location, kind):
            is_text = kind is FOLDER and location_path(location).is_file()
            faults.append(f"{fault}; a text is given as data='NAME={location}'" if is_text else fault)
        elif not kind.is_here(location_path(location)):
            notes.append(f"{location}: there is no such {kind.noun} here, so it is taken for {kind.remote} of the Hub")
    adapters = _adapters(base, models, faults)
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))
    folder = file.resolve().parent
    base_source = _scalar(location_from(folder, base))
    sources = {name: _scalar(location_from(folder, location)) for name, location in models.items()}
    sources |= {name: f"{{model: {base_source}, adapter: {sources[name]}}}" for name in adapters}
    data = {name: location_from(folder, text) for name, text in files.items()}
    advice = TEXT if data else WEIGHTS
    text = _recipe_text(base_source, sources, advice, data, _unused_output(folder, file.stem))
    Recipe.parse(text, folder)
    local_files = dict.fromkeys(file for file in files.values() if location_path(file).is_file())
    return Starter(text, advice.method, tuple(models), tuple(local_files), tuple(notes))


# --- names ----------------------------------------------------------------------------------------


def _named_experts(arguments: Sequence[str], faults: list[str]) -> dict[str, str]:
    """The location of each expert by its name; names that a user chose are taken first."""
    pairs = [_name_and_location(argument) for argument in arguments]
    names: list[str] = []
    for name, location in pairs:
        try:
            expert_name(name or "expert")
        except ValueError as error:
            faults.append(f"{name}={location}: {error}")
        if name and name in names:
            faults.append(f"{name}={location}: the name {name} is taken; give each expert one of its own")
        names.append(name)
    for i, (_, location) in enumerate(pairs):
        folder = near_path(location_path(location), Path.is_dir)  # the one that is meant, so that its text finds it
        names[i] = names[i] or unused_expert_name(os.path.abspath(folder) if folder else location, names)
    return dict(zip(names, (location for _, location in pairs), strict=True))


def _name_and_location(argument: str) -> tuple[str, str]:
    """The parts of NAME=LOCATION; the name is empty where there is none, as in the name of a folder that has a =."""
    name, _, location = argument.partition("=")
    return (name, location) if "=" in argument and not location_path(argument).is_dir() else ("", argument)


def _named_texts(arguments: Sequence[str], experts: Mapping[str, str], faults: list[str]) -> dict[str, str]:
    """The file of each expert's text by the expert's name; none at all is no fault."""
    files: dict[str, str] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not equals:
            faults.append(f"data='{argument}': expected NAME=FILE, as in data='{next(iter(experts))}={argument}'")
            continue
        if name not in experts:
            faults.append(f"data='{argument}': there is no expert {name!r}; {nearest(name, experts)}")
            name = next(iter(difflib.get_close_matches(name, experts, n=1)), name)
        if name in files:
            faults.append(f"data='{argument}': the text of {name} is {files[name]} already")
        files.setdefault(name, file)
    without_text = [name for name in experts if name not in files]
    if files and without_text:
        options = " ".join(f"data='{name}=FILE'" for name in without_text)
        faults.append(f"data=FILES: no text for {', '.join(without_text)}; add {options}, or leave all texts out")
    return files


def _repeated(base: str, experts: Mapping[str, str]) -> list[str]:
    """The faults of experts that are the base or another expert."""
    roles = {location_path(base).resolve(): "the base"}
    faults = []
    for name, location in experts.items():
        if not location:
            continue
        role = roles.setdefault(location_path(location).resolve(), f"expert {name}")
        if role != f"expert {name}":
            faults.append(f"{location}: is {role} already; name every model once")
    return faults


def _adapters(base: str, experts: Mapping[str, str], faults: list[str]) -> set[str]:
    """The names of the experts whose folder holds an adapter; a folder without weights is a fault."""
    adapters = set()
    for label, location in {"base": base, **experts}.items():
        path = location_path(location)
        if not path.is_dir() or not location:
            continue
        try:
            folder = local_folder(path, label)
            if is_adapter(folder):
                adapters.add(label)
            find_weights(folder, ADAPTER if label in adapters else MODEL)
        except CheckpointError as error:
            models = names_in(path, lambda entry: (entry / "config.json").is_file())
            faults.append(f"{location}: is no model, but has models: {', '.join(models)}" if models else str(error))
    if "base" in adapters:
        faults.append(f"base: {base} is a PEFT adapter; give the model that it was trained on")
    return adapters


def _unused_output(folder: Path, stem: str) -> str:
    """The folder of the merge relative to the recipe's, numbered where one of the name is there."""
    path, number = f"out/{stem}", 1
    while (folder / path).exists():
        number += 1
        path = f"out/{stem}-{number}"
    return path


# --- text -----------------------------------------------------------------------------------------


def _scalar(text: str) -> str:
    """Text as YAML in one line, in quotes where it needs them."""
    flow = yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=10**6)
    return flow.strip()[1:-1]


def _recipe_text(
    base: str, experts: Mapping[str, str], advice: Recommendation, data: Mapping[str, str], output: str
) -> str:
    """The commented recipe; ``base`` and ``experts`` are YAML already."""
    lines = [
        "# A first recipe, by merger init: `merger plan` says what it would do, `merger run` merges.",
        "",
        "# The model that the experts were tuned from: a folder beside this file, or org/name@revision on the Hub.",
        f"base: {base}",
        "# Its fine-tunes by name, or adapters for it: NAME: {model: BASE, adapter: FOLDER}.",
        "experts:",
        *(f"  {_scalar(name)}: {model}" for name, model in experts.items()),
        "",
        f"# {advice.method} {advice.reason}; {advice.evidence}.",
        f"method: {advice.method}",
        *(_calibration_lines(data) if data else [f"# With text of each expert, merger init writes {TEXT.method}."]),
        "",
        "# A new folder; it appears when the merge is whole.",
        f"output: {{path: {_scalar(output)}}}",
    ]
    return "\n".join(lines) + "\n"


def _calibration_lines(data: Mapping[str, str]) -> list[str]:
    return [
        "",
        "# Text like that which each expert was tuned on: a `text`, `prompt` or `messages` a record, no labels.",
        "calibration:",
        "  data:",
        *(f"    {_scalar(name)}: {_scalar(file)}" for name, file in data.items()),
        f"  # Of each expert: {SAMPLES_REASON}.",
        f"  samples: {SAMPLES}",
    ]
