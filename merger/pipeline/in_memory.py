"""Merging tensors that are in memory, by the same stages as files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.ops import kernels
from merger.ops.questions import Flow
from merger.ops.rounding import restored
from merger.pipeline.flow import Slice, Subject, flow
from merger.pipeline.parameters import Place
from merger.pipeline.passes import EarlierSums, ModelTotals, OpenTotal, Sizes, run_slices, run_tensors
from merger.pipeline.registry import Stage
from merger.pipeline.stages import bind, expand, natural, rebuilt, slice_height

if TYPE_CHECKING:
    from torch import Tensor


def merge_tensors(
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
    model = sum(base[name].numel() for name in names)

    def visit(i: int, model_totals: ModelTotals, earlier_sums: EarlierSums) -> OpenTotal | None:
        name = names[i]
        base_matrix = _matrix(base[name])
        if not base_matrix.numel():
            return None
        expert_matrices = torch.stack([_matrix(tensors[name]) for tensors in experts.values()])
        kind = (kinds or {}).get(name, "linear" if base[name].dim() > 1 else "vector")
        place = (places or {}).get(name, Place(tuple(experts)))
        height, width = base_matrix.shape
        tensor_inputs = (inputs or {}).get(name, {})
        subject = Subject(
            name, kind, place, height, width, seed=seed, features_are_rows=kind == "conv1d", inputs=tensor_inputs
        )
        bound = [bind(s, place) for stage in pipeline for s in expand(stage, kind, place.experts)]
        rows = slice_height(height, width, bound, slice_elements)
        firsts = range(0, base_matrix.shape[0], rows)

        def carry(j: int) -> Flow[None]:
            part = slice(firsts[j], firsts[j] + rows)
            stored = torch.cat([base_matrix[None, part], expert_matrices[:, part]])
            piece = Slice(firsts[j], *kernels.for_stored(stored).difference(stored, _anything_goes))
            result: Any = yield from flow(bound, piece, subject)
            packed = bound[-1].entry.packing is not None
            delta = rebuilt(bound[-1], result, place.experts.index(expert or place.experts[0])) if packed else result
            _matrix(merged[name])[part] = restored(stored, piece.base, piece.deltas, delta, torch.float32)

        return run_slices(
            len(firsts),
            carry,
            sizes=Sizes(base_matrix.numel(), model),
            model_totals=model_totals,
            earlier_sums=earlier_sums,
        )

    run_tensors([0] * len(names), visit)
    return merged


def _anything_goes() -> None:
    """Values that are not finite are the caller's affair."""


def _matrix(tensor: Tensor) -> Tensor:
    """Rows of the last axis; a vector or a scalar is one row."""
    *rows, columns = tensor.shape or (1,)
    return tensor.float().reshape(math.prod(rows), columns)
