"""A pipeline of stages, applied to one tensor slice by slice: stages in, one merged delta out.

Every slice runs the same flow. Where a flow asks about the whole tensor, the question goes to all
slices, their parts are put together, and every flow goes on with the answer: those that were held
in memory from where they stopped, the others from the start, with the answers so far.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from merger.ops import kernels
from merger._lazy import torch
from merger.ops.rounding import restored
from merger.pipeline.parameters import Place, resolve, turns
from merger.pipeline.registry import Entry, Fed, Form, Stage, Takes, entry_of, parameters, supplied
from merger.ops.arithmetic import Flow, Max, Size, Sum, uniforms
from merger.pipeline.passes import Ahead, Sizes, run, settle

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What calibration knows of the inputs of one matrix: a value per expert and input feature."""

    second_moment: Tensor | None = None  # [k c]
    mean: Tensor | None = None  # [k c]
    gram: Tensor | None = None  # [k c c]
    token_share: Tensor | None = None  # [k r], for an embedding

    def on(self, device: torch.device) -> Inputs:
        """The same, where a slice is."""
        several = self.second_moment, self.mean, self.gram, self.token_share
        there = [None if each is None else each.to(device) for each in several]
        return self if all(each is own for each, own in zip(there, several, strict=True)) else Inputs(*there)

    @cached_property
    def reached(self) -> Tensor | None:
        """Which experts have inputs to this matrix at all, [k 1]: none, where no token was routed to a packed one."""
        return None if self.second_moment is None else (self.second_moment != 0).any(1, keepdim=True)

    @cached_property
    def judged(self) -> tuple[Tensor | None, Tensor | None]:
        """Second moment and mean [k c], and 1 where no input was ever seen."""
        return _filled(self.second_moment), _filled(self.mean)


def _filled(values: Tensor | None) -> Tensor | None:
    """With 1 for whoever has only zeros."""
    return None if values is None else values.masked_fill(~(values != 0).any(1, keepdim=True), 1)


@dataclass(frozen=True)
class Subject:
    """One tensor as its stages see it: r rows of c columns."""

    name: str
    kind: str
    place: Place
    rows: int
    columns: int
    seed: int = 0
    first: int = 0  # its first element's position in the stored tensor (a slice of packed experts)
    transposed: bool = False  # stored [in, out] and oriented to [out, in] here
    inputs: Inputs = field(default_factory=Inputs)


@dataclass(frozen=True)
class Slice:
    """Some whole rows of a tensor, in float32."""

    row: int
    base: Tensor  # [r c]
    deltas: Tensor  # [k r c]


# --- stages ---------------------------------------------------------------------------------------


def expand(chosen: Stage, kind: str, experts: Sequence[str]) -> list[Stage]:
    """The stages of a named method for a tensor of this kind; a stage is a pipeline of itself or of what it names."""
    entry = entry_of(chosen.func)
    stages: list[Stage] | None = entry.elsewhere(kind, **chosen.keywords)
    if stages is None and entry.kind != "method":
        return [chosen]
    if stages is None:
        known = {"kind": kind, "experts": tuple(experts)}
        stages = chosen(**{name: known[name] for name in supplied(chosen.func)})
    return [each for stage in stages for each in expand(stage, kind, experts)]


@dataclass(frozen=True)
class Bound:
    """A stage with its parameters settled for one tensor."""

    entry: Entry
    values: dict[str, Any]
    score: Bound | None = None
    inner: tuple[Bound, ...] = ()

    @property
    def takes(self) -> Takes:
        """The least this stage must see at once."""
        return self.entry.takes(**self.values)

    @property
    def calibrated(self) -> bool:
        """Whether this stage looks at what enters the layer."""
        within = [*self.inner, *([] if self.score is None else [self.score])]
        return any(each.calibrated for each in within) or self.entry.calibrated(**self.values)

    @property
    def gram(self) -> bool:
        """Whether this stage takes the Gram matrices of what enters the layer."""
        return "gram" in supplied(self.entry.function)

    @property
    def fed(self) -> Fed:
        """What feeds the blocks in which this stage's Gram matrices are made."""
        return self.entry.fed(**self.values)

    @property
    def align(self) -> int:
        """The number of elements that every slice must begin at a multiple of."""
        own = int(self.values[self.entry.align]) if self.entry.align else 1
        return math.lcm(own, 8) if self.entry.packing else own  # bits are stored by the byte

    def forms(self, rows: int, columns: int) -> dict[str, Form]:
        """How the results of this stage, a pack, are stored for a matrix of this size."""
        assert self.entry.packing is not None, "it is a pack"
        return self.entry.packing.forms(rows=rows, columns=columns, **self.values)


def rebuilt(packed: Bound, results: Mapping[str, Tensor], expert: int) -> Tensor:
    """The task vector [r c] that a pack's results hold of one expert."""
    assert packed.entry.packing is not None, "it is a pack"
    forms = packed.forms(0, 0)
    own = {name: value if forms[name].shared else value[expert] for name, value in results.items()}
    return packed.entry.packing.unpack(**own)


def bind(stage: Stage, place: Place) -> Bound:
    """Settles a stage's parameters for the tensor at ``place``; ValueError if they exclude each other.

    An expert's own weight multiplies the `weight` that a merger is given for it.
    """
    entry = entry_of(stage.func)
    values = {}
    for name, (annotation, _) in parameters(stage.func).items():
        try:
            values[name] = resolve(annotation, stage.keywords[name], place)
        except ValueError as error:
            raise ValueError(f"{name.rstrip('_')}: {error}") from None
    if values.get("scope") == "global" and any(turns(value) for value in stage.keywords.values()):
        raise ValueError("scope: global ranks the whole model at once, so no order can rotate; list it")
    if "weight" in values and place.weights:
        values["weight"] = [w * own for w, own in zip(values["weight"], place.weights, strict=True)]
    if entry.check is not None:
        entry.check(**values)
    named, inner = values.pop("score", None), values.pop("inner", None)
    score = None if named is None else bind(named, place)
    if score is not None and score.calibrated and values.get("scope") == "global":
        raise ValueError(
            f"scope: global ranks the whole model at once, but {score.entry.name} depends on a layer's own inputs, "
            "so its scores of different tensors share no scale; write scope: tensor"
        )
    return Bound(entry, values, score, () if inner is None else _bind_inner(inner, place))


def _bind_inner(inner: Stage, place: Place) -> tuple[Bound, ...]:
    """The stages of a method that merges a matrix in directions of its own; ValueError if one cannot."""
    stages = tuple(bind(each, place) for each in expand(inner, "linear", place.experts))
    for stage in stages:
        if stage.entry.packing is not None:
            raise ValueError(f"inner: {stage.entry.name} makes more than one model; knots merges to one")
        if "base" in supplied(stage.entry.function):
            raise ValueError(
                f"inner: {stage.entry.name} looks at the base's weights, which are not among the directions of the "
                "task vectors; mean, sum or ties do not"
            )
        if stage.values.get("scope") == "global":
            raise ValueError("inner: scope: global would rank matrices whose directions differ; write scope: tensor")
    return stages


def unseen(i: int, deltas: Tensor) -> None:
    """Looks at nothing."""


def flow(
    stages: Sequence[Bound], part: Slice, subject: Subject, look: Callable[[int, Tensor], None] = unseen
) -> Flow[Tensor]:
    """Runs the stages on one slice; its result is the merged delta [r c], or what a pack makes, by name.

    ``look`` is shown what stage i leaves, once more each time the flow is started again.
    """
    return (yield from _through(stages, part.deltas, _supplies(part, subject), look))


def _through(
    stages: Sequence[Bound],
    deltas: Tensor,
    known: Mapping[str, Any],
    look: Callable[[int, Tensor], None] = unseen,
) -> Flow[Tensor]:
    for i, stage in enumerate(stages):
        given = {**known, "deltas": deltas, "inside": partial(_inside, stage.inner, known)}
        if stage.score is not None:
            given["scores"] = yield from _call(stage.score, given)
        deltas = yield from _call(stage, given)
        look(i, deltas)
    return deltas


def _inside(stages: Sequence[Bound], known: Mapping[str, Any], deltas: Tensor) -> Flow[Tensor]:
    """Runs an inner method on the whole of other task vectors [k r' c], r' <= r: a share is one of theirs."""
    rows = deltas.shape[1]

    def uniform(purpose: str, *, double: bool = False) -> Tensor:
        drawn: Tensor = known["uniform"](purpose, double=double)
        return drawn[:, :rows]

    running = _through(stages, deltas, {**known, "originals": deltas, "uniform": uniform})
    try:
        question = next(running)
        while True:
            question = running.send(deltas[0].numel() if isinstance(question, Size) else (yield question))
    except StopIteration as done:
        merged: Tensor = done.value
        return merged


def _call(stage: Bound, known: dict[str, Any]) -> Flow[Tensor]:
    needed = [known[name] for name in supplied(stage.entry.function)]
    result = stage.entry.function(*needed, **stage.values)
    merged: Tensor = (yield from result) if inspect.isgenerator(result) else result
    return merged


def _supplies(part: Slice, subject: Subject) -> dict[str, Any]:
    """What a stage may ask for by name; the registry's docstring explains each."""
    rows = slice(part.row, part.row + part.base.shape[0])
    inputs = subject.inputs.on(part.base.device)
    second_moment, mean = inputs.judged
    return {
        "base": part.base,
        "originals": part.deltas,
        "uniform": partial(_draw, part, subject),
        "second_moment": _by_feature(second_moment, subject, rows),
        "gram": inputs.gram,
        "mean_input": _by_feature(mean, subject, rows),
        "reached": None if inputs.reached is None else inputs.reached.unsqueeze(-1),
        "token_share": None if inputs.token_share is None else inputs.token_share[:, rows].unsqueeze(-1),
        "kind": subject.kind,
        "experts": subject.place.experts,
    }


def _by_feature(values: Tensor | None, subject: Subject, rows: slice) -> Tensor | None:
    """A value per in-feature as [k 1 c]; [k r 1] where the tensor is stored, and seen, as [in, out]."""
    if values is None:
        return None
    if subject.kind == "conv1d" and not subject.transposed:
        return values[:, rows].unsqueeze(-1)
    return values.unsqueeze(1)


def _draw(part: Slice, subject: Subject, purpose: str, *, double: bool = False) -> Tensor:
    """A uniform for every position of the slice, by its place in the stored tensor: [k r c]."""
    rows, columns = part.base.shape
    start = subject.first + part.row * columns
    shape = (columns, rows) if subject.transposed else (rows, columns)  # the stream runs over the stored order
    drawn = torch.stack(
        [
            uniforms((subject.seed, purpose, subject.name, expert), start, *shape, double=double, beside=part.base)
            for expert in subject.place.experts
        ]
    ).to(part.base.device)
    return drawn.transpose(1, 2) if subject.transposed else drawn


def step_rows(columns: int, stages: Sequence[Bound], elements: int) -> int:
    """How many whole rows of a tensor make a slice of about ``elements`` that starts where stages allow."""
    align = math.lcm(*(stage.align for stage in stages))
    unit = align // math.gcd(align, columns)
    return max(1, elements // (columns * unit)) * unit


# --- in memory ------------------------------------------------------------------------------------


def merge_tensors(
    chosen: Stage | Sequence[Stage],
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    places: Mapping[str, Place] | None = None,
    kinds: Mapping[str, str] | None = None,
    inputs: Mapping[str, Inputs] | None = None,
    seed: int = 0,
    slice_elements: int = 1 << 20,
    expert: str | None = None,
) -> dict[str, Tensor]:
    """Merges tensors that are in memory by the same stages as `merge` does files; float32 in and out.

    ``base`` maps names to tensors, ``experts`` an expert's name to its tensors of the same names. Where the
    stages end in a pack, ``expert`` is whose tensors are rebuilt of what it holds.
    """
    names = sorted(base, key=natural)
    merged = {name: torch.empty(base[name].shape, device=base[name].device) for name in names}
    model = sum(base[name].numel() for name in names)

    def visit(i: int, known: Sequence[Any], ahead: Ahead) -> Sum | Max | None:
        name = names[i]
        whole = _matrix(base[name])
        if not whole.numel():
            return None
        own = torch.stack([_matrix(tensors[name]) for tensors in experts.values()])
        kind = (kinds or {}).get(name, "linear" if base[name].dim() > 1 else "vector")
        place = (places or {}).get(name, Place(tuple(experts)))
        height, width = whole.shape
        known_inputs = (inputs or {}).get(name, Inputs())
        subject = Subject(name, kind, place, height, width, seed=seed, inputs=known_inputs)
        given = [chosen] if isinstance(chosen, partial) else chosen
        stages = [bind(s, place) for stage in given for s in expand(stage, kind, place.experts)]
        rows = (
            whole.shape[0]
            if any(s.takes == "matrix" for s in stages)
            else step_rows(whole.shape[1], stages, slice_elements)
        )
        firsts = range(0, whole.shape[0], rows)

        def carry(j: int) -> Flow[None]:
            part = slice(firsts[j], firsts[j] + rows)
            stored = torch.cat([whole[None, part], own[:, part]])
            piece = Slice(firsts[j], *kernels.for_stored(stored).difference(stored, _anything_goes))
            made: Any = yield from flow(stages, piece, subject)
            packed = stages[-1].entry.packing is not None
            delta = rebuilt(stages[-1], made, place.experts.index(expert or place.experts[0])) if packed else made
            _matrix(merged[name])[part] = restored(stored, piece.base, piece.deltas, delta, torch.float32)

        return run(len(firsts), carry, sizes=Sizes(whole.numel(), model), known=known, ahead=ahead)

    settle([0] * len(names), visit)
    return merged


def _anything_goes() -> None:
    """Values that are not finite are the caller's affair."""


def _matrix(tensor: Tensor) -> Tensor:
    """Rows of the last axis; a vector or a scalar is one row."""
    *rows, columns = tensor.shape or (1,)
    return tensor.float().reshape(math.prod(rows), columns)


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts names with their numbers as numbers: layers.2 before layers.10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]
