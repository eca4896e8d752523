"""The plan: the operation on every tensor, as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from merger._display import html_table, size_text
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.forward_order import LAYERS
from merger.checkpoint.packed_experts import COLUMNS
from merger.checkpoint.side_files import SideFile
from merger.checkpoint.tensor_info import Info
from merger.pipeline.inputs import StageInput
from merger.pipeline.parameters import Place
from merger.pipeline.stages import Bound
from merger.planning.packed import Packed
from merger.planning.row_map import RowMap
from merger.recipe.recipe import Recipe


class Part(NamedTuple):
    """One matrix of a stored tensor: all of it, or one slice of packed experts."""

    name: str  # of the tensor, with [e] for slice e
    row: int  # its first row in the stored tensor
    rows: int
    columns: int
    transposed: bool = False  # stored [in, out]; its stages see [out, in]
    input_axis: int = COLUMNS  # along which its inputs lie, as its stages see it

    @property
    def first(self) -> int:
        """The number of elements of the stored tensor that come before it."""
        return self.row * (self.rows if self.transposed else self.columns)

    @property
    def features(self) -> int:
        """How many features its inputs have."""
        return self.columns if self.input_axis == COLUMNS else self.rows


@dataclass(frozen=True)
class ExtraRows:
    """Rows that are not merged, because models lack their token or the recipe says so: the mean of ``models``."""

    start: int
    stop: int
    models: tuple[str, ...]  # none: the rows are zero


@dataclass(frozen=True)
class TensorPlan:
    """The operation on one output tensor."""

    name: str
    info: Info  # dtype and shape as written
    kind: str
    unit: str  # its transformer block, or itself
    place: Place
    group: int  # the number of the choice that it follows among the recipe's: 0 is its own method
    stages: tuple[Bound, ...]  # empty where it is copied
    source: str  # the model it is copied from, or base
    reads: Mapping[str, str | None]  # per model: the tensor that stands for it, None for a zero delta
    item_bytes: float  # of one element, in all models that are read for it; the mean where codes are stored
    parts: tuple[Part, ...] = ()
    extra: tuple[ExtraRows, ...] = ()
    row_maps: Mapping[str, RowMap] = field(default_factory=dict)  # of the models whose rows have other numbers, or gaps
    factors: Mapping[str, Info] | None = None  # by peft's names, in an adapter; empty where it keeps the base's tensor
    tied_to: str | None = None  # the tensor that is stored once more under this name, and written with it
    scale: float = 1.0  # the factor of a copy
    choice: str = "recipe"  # the words for its group: recipe, rule 2 or layers 1

    def renamed(self, name: str, reads: Mapping[str, str | None]) -> TensorPlan:
        """The same operation on a tensor of another name, which the models store under the names ``reads``."""
        twin = copy(self)  # `replace` takes four times as long, and a mixture has tens of thousands
        parts = tuple(Part(name, *part[1:]) for part in self.parts)
        vars(twin).update(name=name, reads=reads, parts=parts)
        return twin

    @property
    def inputs(self) -> frozenset[StageInput]:
        """The inputs that its stages take beside the weights."""
        return frozenset[StageInput]().union(*(stage.inputs for stage in self.stages))

    @property
    def is_layer(self) -> bool:
        """Whether activations are multiplied by it, as by the head though it may be the embedding."""
        return self.kind in (*LAYERS, "tied")

    @property
    def lockstep(self) -> bool:
        """Whether an input of its stages is made block by block, while the model is merged."""
        return any(item.granularity == "block" for stage in self.stages for item in stage.inputs)

    @property
    def follows_blocks(self) -> bool:
        """Whether it waits for the last block, as a head does, though the embedding that it may be comes first."""
        return self.lockstep and self.unit == self.name

    @property
    def ranked(self) -> bool:
        """Whether any of its stages looks at all tensors of its group together."""
        return any(stage.values.get("scope") == "global" for stage in self.stages)

    @cached_property
    def packed(self) -> Packed | None:
        """The packed form of the tensor, if its last stage is a pack."""
        if not self.parts or not self._is_packed:
            return None
        first, last = self.parts[0], self.stages[-1]
        forms = last.forms(first.rows, first.columns)
        return Packed(
            name=self.name,
            by=last.entry.name,
            experts=self.place.experts,
            forms=forms,
            info=self.info,
            rows=first.rows,
            columns=first.columns,
            matrices=len(self.parts),
            transposed=first.transposed,
        )

    @property
    def _is_packed(self) -> bool:
        return bool(self.stages) and self.stages[-1].entry.packing is not None

    @property
    def stored(self) -> Mapping[str, Info]:
        """All that is written of it, by name."""
        if self.factors is not None:
            return self.factors
        if not self._is_packed:
            return {self.name: self.info}
        if self.tied_to is not None:  # it is rebuilt from that tensor's results
            return {}
        return {self.name: self.info} if self.packed is None else self.packed.infos

    def merged_rows(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of rows from ``start`` to ``stop`` that are merged."""
        for rows in self.extra:
            if start < min(rows.start, stop):
                yield start, min(rows.start, stop)
            start = max(start, rows.stop)
        if start < stop:
            yield start, stop

    @property
    def elements(self) -> int:
        """How many elements are merged, without rows that only some models have."""
        return sum(part.rows * part.columns for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """All that will be done, in canonical order: the natural order of names."""

    recipe: Recipe
    models: Mapping[str, Checkpoint]  # base first, then the experts in recipe order
    tensors: tuple[TensorPlan, ...]
    dropped: Mapping[str, Mapping[str, str]]  # per model: input tensors that are left out, and why
    notes: tuple[str, ...]
    config: Mapping[str, Any]  # config.json of the output
    tokenizer: str  # the model whose tokenizer the output gets
    side_files: Mapping[str, SideFile]  # all files beside the weights, by name

    def __repr__(self) -> str:
        merged = sum(bool(tensor.stages) for tensor in self.tensors)
        counts = f"{len(self.tensors)} tensors, {merged} of them merged"
        return (
            f"Plan({counts}; reads {size_text(self.bytes_read)}, writes {size_text(self.bytes_written)}; {self.recipe})"
        )

    def _repr_html_(self) -> str:
        groups: dict[str, list[TensorPlan]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.kind, []).append(tensor)
        rows = [
            (
                kind,
                len(tensors),
                sum(bool(tensor.stages) for tensor in tensors),
                size_text(sum(info.nbytes for tensor in tensors for info in tensor.stored.values())),
            )
            for kind, tensors in groups.items()
        ]
        return html_table(repr(self), ("kind", "tensors", "merged", "bytes"), rows)

    @property
    def base(self) -> Checkpoint:
        """The base checkpoint."""
        return self.models["base"]

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of tensors in the output."""
        return sum(info.nbytes for info in self.stored.values())

    @cached_property
    def stored(self) -> dict[str, Info]:
        """All tensors of the output, by name."""
        return {name: info for tensor in self.tensors for name, info in tensor.stored.items()}

    def written_names(self, tensor: TensorPlan) -> list[str]:
        """The names under which a tensor is written: those of its results, or its own and those that repeat it."""
        is_stored_once = tensor.packed is not None or tensor.factors is not None
        return [*tensor.stored, *([] if is_stored_once else self._repeated_names.get(tensor.name, ()))]

    @cached_property
    def _repeated_names(self) -> Mapping[str, Sequence[str]]:
        """The names that store a tensor once more, as a tied head its embedding, by the tensor's own name."""
        names: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if tensor.tied_to is not None:
                names.setdefault(tensor.tied_to, []).append(tensor.name)
        return names

    @property
    def packed(self) -> bool:
        """Whether the output holds several experts, of which `extract` makes a model each."""
        return any(tensor.packed is not None for tensor in self.tensors)

    @property
    def left_out(self) -> frozenset[str]:
        """The tensors that are merged and that an adapter does not hold, so that their change is only measured."""
        return frozenset(tensor.name for tensor in self.tensors if tensor.stages and tensor.factors == {})

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs that the output is made of, each read once."""
        return sum(
            self.bytes_of(tensor, tensor.elements) + sum(self.bytes_of_rows(tensor, rows) for rows in tensor.extra)
            for tensor in self.tensors
        )

    def bytes_of(self, tensor: TensorPlan, elements: int) -> int:
        """Bytes that so many elements of a tensor take in all models that are read for it."""
        return round(elements * tensor.item_bytes)

    def bytes_of_rows(self, tensor: TensorPlan, rows: ExtraRows) -> int:
        """Returns the bytes of rows that only some models have."""
        infos = (self.models[label].tensors[tensor.reads[label] or tensor.name] for label in rows.models)
        elements = (rows.stop - rows.start) * tensor.info.elements // tensor.info.shape[0]
        return sum(round(elements * info.stored_size) for info in infos)

    @cached_property
    def inputs(self) -> frozenset[StageInput]:
        """The inputs that stages take beside the weights."""
        return frozenset[StageInput]().union(*(tensor.inputs for tensor in self.stage_examples))

    @cached_property
    def stage_examples(self) -> tuple[TensorPlan, ...]:
        """One tensor for each tuple of stages: stages are bound once for all tensors of a kind in a block."""
        return tuple({id(tensor.stages): tensor for tensor in self.tensors}.values())

    @property
    def runs_models(self) -> bool:
        """Whether text goes through some expert, since stages take inputs that no file of the recipe holds."""
        calibration = self.recipe.calibration
        if calibration is None or not any(item.needs_text for item in self.inputs):
            return False
        return self.follows_merge or any(name not in calibration.stats for name in self.recipe.experts)

    @property
    def follows_merge(self) -> bool:
        """Whether some inputs are made behind the merged blocks, so that no file can hold them."""
        return any(item.follows_merge for item in self.inputs)

    def close(self) -> None:
        """Closes the inputs."""
        for model in self.models.values():
            model.close()
