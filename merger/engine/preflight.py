"""Checks before a merge starts: the place of the output, its disk, and a forecast of memory and disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merger.calibration.provider import cost
from merger.calibration.text_forecast import TextForecast, forecast_texts
from merger.checkpoint.output import unfinished_bytes
from merger.checkpoint.placement import output_fault
from merger.engine.machine import Machine, select_devices
from merger.errors import RecipeError, ResourceError
from merger.options import RunOptions
from merger.planning.plan import Plan
from merger.recipe.recipe import Recipe


def check_locations(recipe: Recipe, output: Path, *, force: bool) -> None:
    """Raises RecipeError for an output that has no place, with all inputs that are not there; opens no input."""
    _refuse_place(recipe, output, recipe.folders(), force=force, faults=recipe.missing_inputs())


def check_place(plan: Plan, output: Path, *, force: bool) -> None:
    """Raises RecipeError if the output would replace inputs of the merge or files of the user."""
    models = plan.models.values()
    inputs = [
        checkpoint.directory for model in models for checkpoint in (model, model.adapter) if checkpoint is not None
    ]
    _refuse_place(plan.recipe, output, inputs, force=force)


def _refuse_place(
    recipe: Recipe, output: Path, inputs: Iterable[Path], *, force: bool, faults: Sequence[str] = ()
) -> None:
    if fault := output_fault(output, inputs, neighbours=recipe.surroundings(), force=force):
        raise RecipeError([*faults, recipe.fault(("output", "path"), fault)])


def check_disk(plan: Plan, output: Path) -> None:
    """ResourceError if the output cannot fit the disk it goes to."""
    free = _free_bytes(output)
    if plan.bytes_written > free:
        raise ResourceError(f"{output}: needs {plan.bytes_written:,} bytes, but its disk has {free:,} free")


def _free_bytes(output: Path) -> int:
    """Returns the bytes of disk that the output may take."""
    ancestor = next(path for path in (output, *output.parents) if path.exists())
    return shutil.disk_usage(ancestor).free + unfinished_bytes(output)


@dataclass(frozen=True)
class Forecast:
    """The resources that a merge would need on this machine."""

    memory: int  # bytes of host memory
    disk_free: int
    passes_over_model: bool  # whether some stage ranks all tensors together, and so reads them again
    kept_grams: int  # bytes of disk that `merger calibrate --gram` would take at most
    cached: int  # bytes of disk that inputs of stages take in the cache, where they are as large as weights
    devices: tuple[str, ...] | None  # None: nobody asked, and torch need not be loaded


def preview(plan: Plan, output: Path, max_memory: int | None, device: str | None = None) -> Forecast:
    """Returns the resources that a merge would need, with the refusals of the merge itself; writes nothing."""
    check_place(plan, output, force=True)  # an occupied output is a matter of a flag
    check_disk(plan, output)
    machine = Machine.of(device or "cpu", max_memory, plan)
    ranked = any(tensor.ranked for tensor in plan.tensors)
    inputs = cost(plan)
    memory = machine.needed + machine.hold
    memory += (
        inputs.hidden_states if machine.hidden_memory is None else min(machine.hidden_memory, inputs.hidden_states)
    )
    return Forecast(
        memory, _free_bytes(output), ranked, inputs.files, inputs.cached, machine.devices if device else None
    )


def preview_texts(plan: Plan, options: RunOptions) -> dict[str, TextForecast]:
    """Returns a forecast for the text of each expert whose model will run; loads torch only where there is one."""
    if not plan.runs_models:
        return {}
    return forecast_texts(plan, replace(options, device=select_devices(options.device)[0]))
