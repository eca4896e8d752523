"""From a recipe to everything that its stages need: open inputs, a plan, a machine, and inputs of the stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType

from merger.calibration.provider import Block, BlockProvider, ModelProvider, PartialMerge, Source, model_providers
from merger.engine.machine import Machine
from merger.engine.output_plan import plan as make_plan
from merger.engine.preflight import check_disk, check_locations, check_place
from merger.ops import kernels
from merger.options import RunOptions, check_options
from merger.planning.plan import Plan
from merger.recipe.recipe import Recipe

_SLOW = "merger was installed without its compiled loops, so this takes several times as long; a C compiler makes them"


@dataclass(frozen=True)
class StageInputs:
    """The inputs of a plan's stages, from their providers; each is made when it is first asked for."""

    plan: Plan
    options: RunOptions  # with a definite device
    hidden_memory: int | None  # bytes of hidden states that may stay in memory; None: all of them

    @property
    def files(self) -> Mapping[str, Path]:
        """The files of inputs for the whole model; none where no stage takes any. Raises CheckpointError.

        Their keys are the experts; where there are several providers, each with the inputs it makes: ``age of code``.
        """
        single = len(self._provider_files) == 1
        return {
            name if single else f"{', '.join(sorted(provider.supplies))} of {name}": path
            for provider, paths in self._provider_files
            for name, path in paths.items()
        }

    @cached_property
    def _provider_files(self) -> Sequence[tuple[ModelProvider, Mapping[str, Path]]]:
        """Each provider of inputs for the whole model, with its files by expert."""
        return [(provider, self.find(provider)) for provider in model_providers(self.plan)]

    def find(self, provider: ModelProvider) -> Mapping[str, Path]:
        """The files of one provider: of an earlier run, or new ones."""
        return provider.files(self.plan, self.options, self.hidden_memory)

    def sources(self) -> Sequence[Source]:
        """The inputs for the whole model, in memory."""
        return [provider.open(self.plan, paths) for provider, paths in self._provider_files]

    def blocks(self, provider: BlockProvider, merge: PartialMerge) -> Iterator[Block]:
        """The inputs of one block after the other, as they are made in lockstep with the merge."""
        return provider.blocks(self.plan, self.options, self.hidden_memory, merge)


@dataclass(frozen=True)
class Prepared:
    """A plan with open inputs and the inputs of its stages; the context manager closes them."""

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
    check_options(options)
    if output is not None:
        check_locations(recipe, output, force=force)
    plan = make_plan(recipe, offline=options.offline, headers_only=False, trust_remote_code=options.trust_remote_code)
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
    return Prepared(plan, machine, options, StageInputs(plan, options, machine.hidden_memory))
