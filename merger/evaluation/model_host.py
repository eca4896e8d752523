"""Models in memory: a checkpoint's weights, or those of a merge that no disk has seen, in a transformers model."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from merger.calibration.model import build
from merger.calibration.statistics import Merged, Options, Statistics, grams
from merger.calibration.statistics import calibrate as statistics_files
from merger.calibration.weights import Loader
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.tensor_info import Info, torch_dtype
from merger.engine.loop import Block, Progress
from merger.engine.machine import Machine, chosen_devices
from merger.engine.merge import carry_out
from merger.errors import RecipeError
from merger.planning.plan import Plan, TensorPlan
from merger.planning.planner import plan as make_plan
from merger.recipe.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

KEPT_GRAMS = 4 << 30
"""Bytes of Gram matrices that are kept for the next merge; more are made anew for each."""


@dataclass(frozen=True)
class Way:
    """How models are held and merged on this machine."""

    device: str = "auto"
    dtype: torch.dtype | None = None  # of forward passes; None: as `forward_dtype` says
    max_memory: int | None = None
    offline: bool = False
    trust_remote_code: bool = False
    progress: Progress = field(default=lambda what, done, total: None)
    notice: Callable[[str], None] = field(default=lambda message: None)

    @classmethod
    def of(
        cls,
        dtype: str | None,
        device: str,
        max_memory: int | None,
        offline: bool,
        trust_remote_code: bool,
        progress: Progress | None,
        notice: Callable[[str], None] | None,
    ) -> Way:
        """The same, as recipes and commands say it."""
        told = {"progress": progress, "notice": notice}
        heard: dict[str, Any] = {name: each for name, each in told.items() if each is not None}
        named = None if dtype is None else getattr(torch, dtype)
        return cls(device, named, max_memory, offline, trust_remote_code, **heard)


class Held(Checkpoint):
    """The weights of a merge in memory, as `merger run` would write them; it takes their bytes from many threads."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        super().__init__("the merge", directory, {tensor.name: tensor.info for tensor in plan.tensors}, plan.config)
        self._values = {name: torch.empty(info.shape, dtype=torch_dtype(info)) for name, info in self.tensors.items()}
        self._bytes = {name: each.view(-1).view(torch.uint8).numpy() for name, each in self._values.items()}
        (directory / "config.json").write_text(json.dumps(self.config))

    def fits(self, plan: Plan) -> bool:
        """Whether a plan's tensors have their place here."""
        same = self.tensors.keys() == {tensor.name for tensor in plan.tensors} and self.config == plan.config
        return same and all(_alike(self.tensors[tensor.name], tensor.info) for tensor in plan.tensors)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Takes a tensor's bytes from byte ``start`` on."""
        self._bytes[name][start : start + data.nbytes] = data.cast("B")

    def read(self, name: str) -> Tensor:
        """The tensor itself, which the next merge overwrites."""
        return self._values[name]


@dataclass(frozen=True)
class _Fresh:
    """A place for a merge's bytes that gives back only what this merge has made."""

    held: Held
    whole: set[str] = field(default_factory=set)

    def write(self, name: str, start: int, data: memoryview) -> None:
        self.held.write(name, start, data)

    def done(self, name: str, notes: Sequence[str]) -> None:
        self.whole.add(name)

    def read(self, name: str) -> Tensor | None:
        return self.held.read(name) if name in self.whole else None


def _alike(one: Info, other: Info) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape)


class Bench:
    """Puts one model after the other into memory; what merges share is made once and kept until it is closed."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self._folder = tempfile.TemporaryDirectory(prefix="merger-")
        self._held: tuple[Held, Loader] | None = None
        self._statistics: dict[str, dict[str, Path]] = {}
        self._grams: dict[str, list[tuple[list[str], Mapping[str, Statistics]]]] = {}
        self._told: set[str] = set()
        self._lock = Lock()

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held = None
        self._folder.cleanup()

    @property
    def device(self) -> torch.device:
        """Where models are."""
        return torch.device(chosen_devices(self.way.device)[0])

    def dtype_for(self, weights: Checkpoint) -> torch.dtype:
        """What the forward passes of a model are computed in."""
        return self.way.dtype or forward_dtype(weights, self.device)

    # --- models -----------------------------------------------------------------------------------

    def model_of(self, weights: Checkpoint) -> Any:
        """The transformers model of a checkpoint, whole in memory."""
        return self._loaded(weights).model

    def merged(self, recipe: Recipe) -> tuple[Any, Held]:
        """The transformers model of a merge, and its weights as they would be on disk; both are the next merge's too.

        The bytes are those that `merger run` writes. Raises what `merge` raises.
        """
        plan = make_plan(recipe, offline=self.way.offline, headers_only=False)
        try:
            if plan.packed:
                raise RecipeError(
                    "a pack holds each expert apart and is no model; judge what `merger extract` rebuilds"
                )
            held, loader = self._room(plan)
            self._merge(plan, held)
        finally:
            plan.close()
        loader.load("", held)
        return loader.model, held

    def _loaded(self, weights: Checkpoint) -> Loader:
        model = build(weights, trust_remote_code=self.way.trust_remote_code)
        loader = Loader(model, weights, self.device, self.dtype_for(weights))
        loader.load("", weights)
        return loader

    def _room(self, plan: Plan) -> tuple[Held, Loader]:
        """The place of the last merge, if this one fits it."""
        if self._held is None or not self._held[0].fits(plan):
            self._held = None
            directory = Path(tempfile.mkdtemp(dir=self._folder.name))
            held = Held(plan, directory)
            self._held = held, self._loaded(held)
        return self._held

    # --- merges -----------------------------------------------------------------------------------

    def _merge(self, plan: Plan, held: Held) -> None:
        way = self.way
        machine = Machine.of(way.device, way.max_memory, plan)
        options = Options(machine.device, way.max_memory, way.trust_remote_code)
        names = {tensor.name for tensor in plan.tensors}
        known = self._statistics_of(plan, options)
        blocks = partial(self._blocks, plan, options)
        carry_out(plan, machine, names, _Fresh(held), known, blocks, progress=way.progress, notice=self._say)

    def _say(self, message: str) -> None:
        """Each remark once, however many merges make it."""
        with self._lock:
            heard = message in self._told
            self._told.add(message)
        if not heard:
            self.way.notice(message)

    def _statistics_of(self, plan: Plan, options: Options) -> dict[str, Path]:
        """The experts' statistics files, looked for once."""
        if not plan.needs_statistics:
            return {}
        key = _sources(plan)
        if key not in self._statistics:
            found = statistics_files(plan, options, notice=self._say, progress=self.way.progress)
            self._statistics[key] = found
        return self._statistics[key]

    def _blocks(self, plan: Plan, options: Options, merged: Merged) -> Iterator[Block]:
        """The Gram matrices block by block: those of an earlier merge, or new ones, kept while there is room."""
        wanted = {tensor.name: tensor for tensor in plan.tensors if tensor.gram}
        key = json.dumps([_sources(plan), sorted(wanted)])
        if key in self._grams:
            for names, known in self._grams[key]:
                yield [wanted[name] for name in names], known
            return
        fed = any(tensor.fed_by_merged for tensor in plan.tensors)  # then they are this merge's own
        kept: list[tuple[list[str], Mapping[str, Statistics]]] | None = None if fed else []
        size = 0
        for ready, known in grams(plan, options, merged, notice=self._say, progress=self.way.progress):
            if kept is not None:
                kept.append(([tensor.name for tensor in ready], _of(ready, known)))
                size += _bytes(kept[-1][1])
                kept = kept if size <= KEPT_GRAMS else None
            yield ready, known
        if kept is not None:
            self._grams[key] = kept


def _sources(plan: Plan) -> str:
    """What calibration depends on, as far as a recipe says it."""
    recipe = plan.recipe
    given = recipe.model_dump(mode="json", include={"base", "experts", "calibration", "seed"})
    return json.dumps([str(recipe.folder), given])


def _of(tensors: Sequence[TensorPlan], known: Mapping[str, Statistics]) -> Mapping[str, Statistics]:
    """What these tensors need of the statistics."""
    return {
        expert: {name: have[name] for tensor in tensors if (name := tensor.reads[expert]) in have and name is not None}
        for expert, have in known.items()
    }


def _bytes(known: Mapping[str, Statistics]) -> int:
    """What Gram matrices take; layers that share an input share one."""
    several = (each.gram for have in known.values() for each in have.values() if each.gram is not None)
    return sum({gram.untyped_storage().data_ptr(): gram.nbytes for gram in several}.values())


def forward_dtype(weights: Checkpoint, device: torch.device) -> torch.dtype:
    """bfloat16 or float16 where most of the checkpoint is stored so and the device multiplies it fast, else float32.

    On two cores with AVX512-BF16 a 135M model read 1.8 times as many tokens a second in bfloat16 as in float32.
    """
    sizes: Counter[str] = Counter()
    for info in weights.tensors.values():
        sizes[info.dtype] += info.elements
    ((stored, _),) = sizes.most_common(1)
    if stored == "BF16" and (device.type != "cpu" or _cpu_has_bfloat16()):
        return torch.bfloat16
    return torch.float16 if stored == "F16" and device.type != "cpu" else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; a torch that does not say so is taken for one that does not."""
    probe: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return probe()
