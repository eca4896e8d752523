"""Merging tensors that are in memory, by the same stages as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger._order import natural
from merger.ops import kernels
from merger.ops.questions import Flow
from merger.ops.rounding import restored
from merger.pipeline.flow import Slice, Subject, flow
from merger.pipeline.parameters import Place
from merger.pipeline.passes import EarlierSums, ModelTotals, OpenTotal, Sizes, run_slices, run_tensors
from merger.pipeline.registry import Stage
from merger.pipeline.stages import Bound, bind, expand, rebuilt, slice_height

if TYPE_CHECKING:
    from torch import Tensor


def merge_stages(
    stages: Stage | Sequence[Stage],
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    places: Mapping[str, Place] | None = None,
    kinds: Mapping[str, str] | None = None,
    inputs: Mapping[str, Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    slice_elements: int = 1 << 20,
    expert: str | None = None,
) -> dict[str, Tensor]:
    """Merges tensors that are in memory by the same stages as `merge` does files; float32 in and out.

    ``base`` maps names to tensors, ``experts`` an expert's name to its tensors of the same names. Where the
    stages end in a pack, ``expert`` is whose tensors are rebuilt of what it holds.
    """
    pipeline = [stages] if isinstance(stages, partial) else stages
    names = sorted(base, key=natural)
    merged = {name: torch.empty(base[name].shape, device=base[name].device) for name in names}
    model_size = sum(tensor.numel() for tensor in base.values())

    def visit(i: int, model_totals: ModelTotals, earlier_sums: EarlierSums) -> OpenTotal | None:
        name = names[i]
        if not base[name].numel():
            return None
        place = (places or {}).get(name, Place(tuple(experts)))
        kind = (kinds or {}).get(name, "linear" if base[name].dim() > 1 else "vector")
        base_matrix = _matrix(base[name])
        height, width = base_matrix.shape
        subject = Subject(
            name, kind, place, height, width, seed=seed,
            features_are_rows=kind == "conv1d", inputs=(inputs or {}).get(name, {}),
        )  # fmt: skip
        merge = _TensorMerge(
            subject,
            bounds=[bind(s, place) for stage in pipeline for s in expand(stage, kind, place.experts)],
            stored=torch.stack([base_matrix, *(_matrix(tensors[name]) for tensors in experts.values())]),
            merged=_matrix(merged[name]),
            packed_expert=place.experts.index(expert or place.experts[0]),
        )
        sizes = Sizes(base_matrix.numel(), model_size)
        return merge.run(slice_elements, sizes, model_totals, earlier_sums)

    run_tensors([0] * len(names), visit)
    return merged


@dataclass(frozen=True)
class _TensorMerge:
    """The merge of one tensor as a matrix."""

    subject: Subject
    bounds: Sequence[Bound]
    stored: Tensor  # [1+k r c], the base and the experts
    merged: Tensor  # [r c], the result
    packed_expert: int  # whose tensor is rebuilt of a pack

    def run(
        self, slice_elements: int, sizes: Sizes, model_totals: ModelTotals, earlier_sums: EarlierSums
    ) -> OpenTotal | None:
        """Carries its slices as far as the totals over the model allow; see `run_slices`."""
        _, height, width = self.stored.shape
        rows = slice_height(height, width, self.bounds, slice_elements)
        firsts = range(0, height, rows)
        return run_slices(
            len(firsts),
            lambda j: self._carry(slice(firsts[j], firsts[j] + rows)),
            sizes=sizes,
            model_totals=model_totals,
            earlier_sums=earlier_sums,
        )

    def _carry(self, rows: slice) -> Flow[None]:
        stored, last = self.stored[:, rows].contiguous(), self.bounds[-1]
        piece = Slice(rows.start, *kernels.for_stored(stored).difference(stored, _anything_goes))
        result: Any = yield from flow(self.bounds, piece, self.subject)
        delta = result if last.entry.packing is None else rebuilt(last, result, self.packed_expert)
        self.merged[rows] = restored(stored, piece.base, piece.deltas, delta, torch.float32)


def _anything_goes() -> None:
    """Values that are not finite are the caller's affair."""


def _matrix(tensor: Tensor) -> Tensor:
    """Rows of the last axis; a vector or a scalar is one row."""
    *rows, columns = tensor.shape or (1,)
    return tensor.float().reshape(math.prod(rows), columns)
