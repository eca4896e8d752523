"""From a recipe to everything that its stages need: open inputs, a plan, a machine, and inputs of the stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType

from merger.calibration.statistics import Merged, Statistics, calibrate, grams
from merger.checkpoint.writer import check_output
from merger.engine.machine import Machine
from merger.engine.preflight import check_disk, check_place
from merger.ops import kernels
from merger.options import RunOptions
from merger.planning.plan import Plan, TensorPlan
from merger.planning.planner import plan as make_plan
from merger.recipe.recipe import Recipe

Block = tuple[list[TensorPlan], Mapping[str, Statistics]]
"""The tensors of one transformer block whose stages need Gram matrices, with those matrices."""

_SLOW = "merger was installed without its compiled loops, so this takes several times as long; a C compiler makes them"


@dataclass(frozen=True)
class StageInputs:
    """What calibration gives to the stages of a plan; it is made when it is first asked for."""

    plan: Plan
    options: RunOptions  # with a definite device
    hidden_memory: int | None  # bytes of hidden states that may stay in memory; None: all of them

    @cached_property
    def statistics(self) -> Mapping[str, Path]:
        """The statistics file of each expert; empty where no stage needs one. Raises as `calibrate` does."""
        return self.find_statistics() if self.plan.needs_statistics else {}

    def find_statistics(self) -> Mapping[str, Path]:
        """The statistics files of an earlier run, or new ones."""
        return calibrate(self.plan, self.options, self.hidden_memory)

    def blocks(self, merged: Merged) -> Iterator[Block]:
        """The Gram matrices, block by block, as `grams` makes them behind the blocks that ``merged`` gives."""
        return grams(self.plan, self.options, self.hidden_memory, merged)


@dataclass(frozen=True)
class Prepared:
    """A plan with open inputs, which it closes at the end of its context, and what its stages work with."""

    plan: Plan
    machine: Machine
    options: RunOptions  # with a definite device
    inputs: StageInputs

    def __enter__(self) -> Prepared:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.plan.close()


def prepare(recipe: Recipe, options: RunOptions, output: Path | None = None, *, force: bool = False) -> Prepared:
    """Opens the inputs of a recipe, plans, and shares out the machine; nothing is written.

    The place and the disk of ``output`` are checked where one is to be written, its place before any download.
    Raises a `MergerError` for whatever the user can mend.
    """
    if output is not None:
        check_output(output, recipe.folders(), beside=recipe.surroundings(), force=force)
    plan = make_plan(recipe, offline=options.offline, headers_only=False)
    try:
        if output is not None:
            check_place(plan, output, force=force)
            check_disk(plan, output)
        machine = Machine.of(options.device, options.max_memory, plan)
    except BaseException:
        plan.close()
        raise
    options = replace(options, device=machine.device)
    if machine.device == "cpu" and not kernels.compiled():
        options.notice(_SLOW)
    return Prepared(plan, machine, options, StageInputs(plan, options, machine.hidden))
