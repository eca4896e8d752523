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
from merger.pipeline.flow import Inputs, Slice, Subject, flow
from merger.pipeline.parameters import Place
from merger.pipeline.passes import EarlierSums, ModelTotals, OpenTotal, Sizes, run_slices, run_tensors
from merger.pipeline.registry import Stage
from merger.pipeline.stages import bind, expand, natural, rebuilt, step_rows

if TYPE_CHECKING:
    from torch import Tensor


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

    def visit(i: int, model_totals: ModelTotals, earlier_sums: EarlierSums) -> OpenTotal | None:
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

        return run_slices(
            len(firsts), carry, sizes=Sizes(whole.numel(), model), model_totals=model_totals, earlier_sums=earlier_sums
        )

    run_tensors([0] * len(names), visit)
    return merged


def _anything_goes() -> None:
    """Values that are not finite are the caller's affair."""


def _matrix(tensor: Tensor) -> Tensor:
    """Rows of the last axis; a vector or a scalar is one row."""
    *rows, columns = tensor.shape or (1,)
    return tensor.float().reshape(math.prod(rows), columns)
