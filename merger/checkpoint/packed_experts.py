"""Packed experts: tensors that stack a matrix of every expert, and the axis of the matrices that is the input.

gpt-oss, Llama 4 and Aria store [E, in, out]; Mixtral, Qwen and Granite as transformers packs them [E, out, in]. A shape
shows which where a bias has the length of one axis alone, or where the width of the hidden states does: it is the
input of what enters the experts (gate, up) and the output of what leaves them (down). A square matrix shows nothing
and is taken to be stored as those of the same checkpoint that do. Calibration holds all of it against the products
that the model computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merger.checkpoint.forward_order import LAST, UNNAMED, role
from merger.checkpoint.tensor_info import Info

COLUMNS, ROWS = -1, -2
"""The axis of a matrix that is the layer's input: its columns, as of a linear layer's [out, in], or its rows."""


def packed_experts(tensors: Mapping[str, Info], config: Mapping[str, Any], width: int | None) -> dict[str, int | None]:
    """Returns the tensors [E, ., .] of packed experts, each with its input axis, or None if the axis is unknown.

    ``width`` is the width of the hidden states.
    """
    counts = set(_numbers_of_experts(config))
    names = [name for name, info in tensors.items() if len(info.shape) == 3 and _is_packed(name, info, counts)]
    axes = {name: _axis_by_bias(name, tensors) or _axis_by_width(name, tensors[name], width) for name in names}
    evident_axes = set(axes.values()) - {None}
    common = evident_axes.pop() if len(evident_axes) == 1 else None
    return {name: axis or common for name, axis in axes.items()}


def _is_packed(name: str, info: Info, counts: set[int]) -> bool:
    """Whether a tensor says that it is packed, or has as many matrices as the config says there are experts."""
    return info.is_float and ("experts" in name or (info.shape[0] in counts and "conv" not in name))


def _numbers_of_experts(config: Mapping[str, Any]) -> Iterator[int]:
    """Every number under a key such as num_local_experts, n_routed_experts or moe_num_experts, in all sections."""
    sections = [config]
    while sections:
        for key, value in sections.pop().items():
            if isinstance(value, Mapping):
                sections.append(value)
            elif str(key).endswith("experts"):
                numbers = value if isinstance(value, list) else [value]
                yield from (number for number in numbers if type(number) is int and number > 1)


def _axis_by_bias(name: str, tensors: Mapping[str, Info]) -> int | None:
    """The input axis of matrices whose bias has the length of the other one alone."""
    stem = name.removesuffix("weight")
    biases = (tensors.get(f"{stem}{suffix}") for suffix in ("bias", "_bias", ".bias"))
    length = next((bias.shape[-1] for bias in biases if bias is not None and bias.shape), None)
    return _other_axis(tensors[name], length)


def _axis_by_width(name: str, info: Info, width: int | None) -> int | None:
    """Returns the input axis of matrices if exactly one axis has the width of the hidden states."""
    place, width_axis = role(name), _other_axis(info, width)
    if place == UNNAMED or width_axis is None:
        return None
    return width_axis if place == LAST else COLUMNS + ROWS - width_axis


def _other_axis(info: Info, length: int | None) -> int | None:
    """The axis of matrices beside the only one of this length."""
    rows, columns = info.shape[1:]
    if (rows == length) == (columns == length):
        return None
    return ROWS if columns == length else COLUMNS
