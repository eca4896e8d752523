"""Quantised weights as inputs: codes and scales that are decoded into float32 row by row as they are read.

What is stored decides which tensors are codes. A scale without its codes, and codes without their scale, are faults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from merger.checkpoint.codes import fp4, integers, scaled
from merger.checkpoint.tensor_info import Info
from merger.errors import CheckpointError

_FORMS = (scaled.find, integers.find, fp4.find)
# Scales of activations and of the cache of keys and values: a model whose weights are floats has no use for them.
_ACTIVATIONS = re.compile(
    r"(?:^|[._])(?:(?:input|output|activation)_(?:global_)?(?:scale(?:_inv)?|zero_point)|[kvq]_scale)$"
)
_SCALE = re.compile(r"(.*(?:weight|proj))_scale(?:_inv)?$")
_SCALE_OF_BLOCKS = re.compile(r"(.*)_scales$")


class Decoded(NamedTuple):
    """A checkpoint's tensors with weights in place of codes, and what a user should know of it."""

    tensors: dict[str, Info]
    remarks: tuple[str, ...]


def decode(label: str, tensors: Mapping[str, Info], config: Mapping[str, Any]) -> Decoded:
    """Returns the tensors with float32 weights in place of codes and scales that are understood.

    Raises CheckpointError for codes without their scale, and for a scale without its codes.
    """
    weights: dict[str, Info] = {}
    used: set[str] = set()
    try:
        for find in _FORMS:
            form_weights, form_names = find(tensors, config)
            weights |= form_weights
            used |= form_names
        _check_scales(tensors, used)
    except ValueError as error:
        raise CheckpointError(f"{label}: {error}") from None
    if not weights:
        return Decoded(dict(tensors), ())
    activations = {name for name in tensors if _ACTIVATIONS.search(name) and name not in used}
    rest = {name: info for name, info in tensors.items() if name not in used | activations}
    remarks = [f"{label}: {len(weights):,} quantised tensors are decoded as they are read; the output is not quantised"]
    if activations:
        remarks.append(f"{label}: {len(activations):,} scales of activations, such as {min(activations)}, are left out")
    return Decoded(rest | weights, tuple(remarks))


def _check_scales(tensors: Mapping[str, Info], used: set[str]) -> None:
    """ValueError for a scale whose codes are not there."""
    for name in tensors.keys() - used:
        codes = _codes_of(name, tensors[name])
        if codes is not None and not {codes, f"{codes}_packed"} & tensors.keys():
            raise ValueError(
                f"{name} is the scale of {codes}, which is not there; download every shard of the model again"
            )


def _codes_of(name: str, info: Info) -> str | None:
    """The name of the codes that a scale is for; None for a tensor that is no scale of weights."""
    if _ACTIVATIONS.search(name):
        return None
    if match := _SCALE.fullmatch(name):
        return match[1]
    match = _SCALE_OF_BLOCKS.fullmatch(name)
    return f"{match[1]}_blocks" if match and info.dtype == "U8" and len(info.shape) == 3 else None
