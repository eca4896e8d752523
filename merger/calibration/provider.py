"""The interface of a provider, which makes inputs of stages and declares their cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from merger.options import RunOptions
from merger.pipeline.inputs import StageInput, declare
from merger.planning.plan import Part, Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from merger.calibration.statistics_files import StatisticsKey

MergedTensors = Callable[[str], "Tensor | None"]
"""Returns a merged tensor by its name in the output; None while it is not merged."""


class PartialMerge(Protocol):
    """A merge in progress, by the names of its output."""

    def read(self, name: str) -> Tensor | None:
        """Returns a merged tensor; None while it is not complete."""

    def draft(self, name: str, sources: Sequence[Source] = ()) -> Tensor | None:
        """Returns a tensor as its stages make it of these inputs of its block alone; None where it waits for none."""


@dataclass(frozen=True)
class Cost:
    """The most that an input takes of a machine, in bytes, told from headers alone."""

    making: int = 0  # of host memory, while it is made
    merging: int = 0  # of host memory, while a block is merged
    hidden_states: int = 0  # of host memory or, where that is too little, of disk
    files: int = 0  # of disk, where the user asks to keep it
    cached: int = 0  # of disk, in the cache


class Source(Protocol):
    """The inputs of some tensors, in memory."""

    def of_part(self, tensor: TensorPlan, part: Part, note: Callable[[str], None]) -> Mapping[str, Tensor]:
        """Returns the inputs of one matrix by name; an input that the matrix does not have is left out."""

    def only(self, tensors: Sequence[TensorPlan]) -> Source:
        """Returns the inputs of these tensors alone."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""


Block = tuple[list[TensorPlan], Source]
"""The tensors of one block whose stages wait for inputs, with these."""


class Provider(Protocol):
    """Makes inputs of stages: for the whole model as one small file an expert, or block by block with the merge."""

    @property
    def inputs(self) -> tuple[StageInput, ...]:
        """The inputs that it is the provider of."""

    @property
    def supplies(self) -> frozenset[str]:
        """The names of all inputs that its sources hold."""

    def cost(self, plan: Plan) -> Cost:
        """Returns the most that its inputs take for this plan."""

    def slice_bytes(self, part: Part, experts: int) -> int:
        """Returns the bytes that its inputs take beside a slice of a matrix."""

    def is_cached(self, key: StatisticsKey) -> bool:
        """Whether an earlier run kept its inputs of an expert."""

    def origins(self, plan: Plan) -> Mapping[str, str | None]:
        """Returns the SHA-256 of the files that its inputs are made from, by name; None where it is not known."""


class ModelProvider(Provider, Protocol):
    """A provider of inputs that exist for the whole model before the merge."""

    def files(self, plan: Plan, options: RunOptions, hidden_memory: int | None) -> Mapping[str, Path]:
        """Returns a file for each expert: of the recipe, of an earlier run, or a new one. Raises CheckpointError."""

    def open(self, plan: Plan, files: Mapping[str, Path]) -> Source:
        """Reads the files."""


class BlockProvider(Provider, Protocol):
    """A provider of inputs that exist for one block at a time."""

    def blocks(
        self, plan: Plan, options: RunOptions, hidden_memory: int | None, merge: PartialMerge
    ) -> Iterator[Block]:
        """Yields the tensors that wait for its inputs, block by block as these are made. Raises CheckpointError."""


_PROVIDERS: list[Any] = []


def register(provider: Any) -> None:
    """Registers a provider, and declares its inputs."""
    declare(*provider.inputs)
    _PROVIDERS.append(provider)


def model_providers(plan: Plan) -> list[ModelProvider]:
    """The providers of the inputs that tensors take which wait for no block."""
    return _providers({item.name for tensor in plan.stage_examples if not tensor.lockstep for item in tensor.inputs})


def block_providers(plan: Plan) -> list[BlockProvider]:
    """The providers that work in lockstep with the merge of this plan; none whose inputs another one supplies too."""
    found: list[BlockProvider] = _providers({item.name for item in plan.inputs if item.granularity == "block"})
    return [p for p in found if not any(q is not p and q.supplies >= {item.name for item in p.inputs} for q in found)]


def providers(plan: Plan) -> list[Provider]:
    """All providers of a plan's inputs."""
    return [*model_providers(plan), *block_providers(plan)]


def input_bytes(tensor: TensorPlan, part: Part, experts: int) -> int:
    """Bytes that the inputs of a tensor's stages take beside a slice of one of its matrices."""
    names = {stage_input.name for stage_input in tensor.inputs}
    return sum(provider.slice_bytes(part, experts) for provider in _providers(names))


def origins(plan: Plan) -> dict[str, str | None]:
    """The SHA-256 of all that the plan's inputs are made from, by name; None where it is not known."""
    return {name: sha256 for provider in providers(plan) for name, sha256 in provider.origins(plan).items()}


def cost(plan: Plan) -> Cost:
    """Returns the peak cost of a plan's inputs: one provider works at a time, but files of all providers add up."""
    costs = [provider.cost(plan) for provider in providers(plan)]
    return Cost(
        making=max((item.making for item in costs), default=0),
        merging=max((item.merging for item in costs), default=0),
        hidden_states=max((item.hidden_states for item in costs), default=0),
        files=sum(item.files for item in costs),
        cached=sum(item.cached for item in costs),
    )


def _providers(names: set[str]) -> list[Any]:
    return [provider for provider in _PROVIDERS if names & {item.name for item in provider.inputs}]
