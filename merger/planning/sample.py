"""A sample of the weights: by how much each expert changed the base, from a run of elements of some matrices.

It takes some 50 ms and no torch, so that `merger plan` can tell a fine-tune from an unrelated model, and an expert that
changed few weights, before anything is merged.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from operator import mul, sub

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.tensor_info import ITEM_SIZE, Info
from merger.errors import UnreadableError, system_reason
from merger.planning.plan import Plan, TensorPlan

MATRICES, ELEMENTS = 32, 2048
"""How many matrices are sampled, evenly over the model, and how many elements from the middle of each."""
FEWEST = 512
"""Fewer elements say too little: n elements of unrelated weights have a cosine of up to some 3/sqrt(n)."""
UNRELATED = 0.5
"""The relative size from which an expert counts as unrelated to the base.

Measured over all matrices: three fine-tunes of a 135M model have 0.004 to 0.005, the demo's experts, trained at a high
rate, 0.08 to 0.12; two models trained from different random weights on the same text have 1.39, two sets of random
weights 1.42. Weights that have nothing in common have at least 1, whatever their sizes.
"""
NOTED = 0.005
"""The share of claimed but unchanged positions from which a note says so."""

_FORMATS = {"F64": "d", "F32": "f", "F16": "e"}
_KINDS = ("linear", "conv1d", "expert3d", "head")


@dataclass(frozen=True)
class SampledChange:
    """The change of one expert in the sample."""

    relative_size: float  # the norm of the expert minus the base, over the norm of the base
    changed: float  # the share of elements that differ from the base
    claimed_unchanged: float  # the share of elements that the expert claims at least without having changed them


def sample_changes(plan: Plan) -> dict[str, SampledChange]:
    """Returns the sampled change of each expert whose weights are on this machine.

    The result is empty if the sample would be too small, or the base's weights are not on this machine.
    """
    local = [label for label, model in plan.models.items() if _is_local(model)]
    experts = tuple(plan.recipe.experts)
    tensors = [t for t in plan.tensors if t.stages and t.kind in _KINDS and t.place.experts == experts]
    count = min(MATRICES, len(tensors))
    picks = [tensors[i * len(tensors) // count] for i in range(count)]
    sample = [tensor for tensor in picks if _is_comparable(plan, tensor, local)]
    if "base" not in local or sum(min(ELEMENTS, tensor.info.elements) for tensor in sample) < FEWEST:
        return {}
    base = [_middle(plan.base, tensor.reads["base"]) for tensor in sample]
    squares = sum(sum(map(mul, values, values)) for values in base)
    if not squares or not isfinite(squares):
        return {}
    changes = {
        expert: _change(plan, sample, base, squares, expert) for expert in plan.recipe.experts if expert in local
    }
    return {expert: change for expert, change in changes.items() if isfinite(change.relative_size)}


def sample_notes(changes: Mapping[str, SampledChange]) -> Iterator[str]:
    """Yields notes on problems of a merge that a sample of the weights shows."""
    for expert, change in changes.items():
        if change.relative_size >= UNRELATED:
            yield (
                f"{expert}: differs from the base by {change.relative_size:.2f} of the base's size in a sample of the "
                "weights, where fine-tunes differ by less than 0.1; was it trained from this base?"
            )
        if change.claimed_unchanged >= NOTED:
            yield (
                f"{expert}: changed {change.changed:.1%} of a sample of the weights, and claims "
                f"{change.claimed_unchanged:.1%} of them without having changed them, which keeps these at the base; "
                "claim_zeros: false leaves them to the next expert"
            )


def _is_local(model: Checkpoint) -> bool:
    return model.adapter is None and all(info.file is not None for info in model.tensors.values())


def _is_comparable(plan: Plan, tensor: TensorPlan, labels: Sequence[str]) -> bool:
    """Whether these models store a matrix in one shape, in row order, and with the same rows."""
    names = [tensor.reads.get(label) for label in labels]
    if None in names or any(row_map.moves_rows for row_map in tensor.row_maps.values()):
        return False
    infos = [plan.models[label].tensors[name or ""] for label, name in zip(labels, names, strict=True)]
    return all(info.is_float and info.is_plain and info.shape == infos[0].shape for info in infos)


def _change(
    plan: Plan, tensors: Sequence[TensorPlan], base: Sequence[Sequence[float]], base_squares: float, expert: str
) -> SampledChange:
    k = list(plan.recipe.experts).index(expert)
    squares = 0.0
    changed = elements = 0
    surplus: dict[tuple[object, ...], float] = defaultdict(float)  # claims beyond the changes, by what is ranked
    for tensor, base_values in zip(tensors, base, strict=True):
        delta = list(map(sub, _middle(plan.models[expert], tensor.reads[expert]), base_values))
        changed_count = len(delta) - delta.count(0.0)
        squares += sum(map(mul, delta, delta))
        changed += changed_count
        elements += len(delta)
        ranked_together = (tensor.group,) if tensor.ranked else (tensor.group, tensor.name)
        surplus[ranked_together] += _claim(tensor, k) * len(delta) - changed_count
    claimed = sum(excess for excess in surplus.values() if excess > 0)
    return SampledChange(sqrt(squares / base_squares), changed / elements, claimed / elements)


def _claim(tensor: TensorPlan, k: int) -> float:
    """The share of a tensor that expert k claims, changed or not."""
    return max((float(stage.claims[k]) for stage in tensor.stages if stage.claims), default=0.0)


def _middle(model: Checkpoint, name: str | None) -> Sequence[float]:
    """The elements in the middle of a tensor."""
    assert name is not None, "tensors that a model lacks are not sampled"
    info = model.tensors[name]
    count = min(ELEMENTS, info.elements)
    stored = _read(info, (info.elements - count) // 2, count)
    if info.dtype == "BF16":  # the upper half of a float32
        widened = bytearray(2 * len(stored))
        widened[2::4], widened[3::4] = stored[0::2], stored[1::2]
        return struct.unpack(f"<{count}f", widened)
    return struct.unpack(f"<{count}{_FORMATS[info.dtype]}", stored)


def _read(info: Info, start: int, count: int) -> bytes:
    assert info.file is not None, "only local weights are sampled"
    size = ITEM_SIZE[info.dtype]
    try:
        with info.file.open("rb") as file:
            file.seek(info.offset + start * size)
            stored = file.read(count * size)
    except OSError as error:
        raise UnreadableError(f"{info.file}: cannot be read: {system_reason(error)}") from None
    if len(stored) < count * size:
        raise UnreadableError(f"{info.file}: ended while it was being read")
    return stored
