"""Orders of experts that turn from one linear layer to the next: `order: {unit: linear}`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from merger.checkpoint.forward_order import LAYERS, forward_key
from merger.checkpoint.tensor_kinds import TensorKinds
from merger.pipeline.parameters import Pinned
from merger.pipeline.registry import Stage

KindsOf = Callable[[str], TensorKinds]
"""Gives the kinds of the checkpoint by which the kind and the place of a tensor are told."""


def linear_turns(stages: Iterable[Stage], experts: int) -> int:
    """After how many linear layers all orders of some stages begin again; 1 where none turns with the layers."""
    values = [value for stage in stages for value in stage.keywords.values()]
    nested = [value for value in values if isinstance(value, partial)]
    orders = [value for value in values if isinstance(value, Pinned)]
    turns = [
        experts - len({order.first, order.last} - {None})
        for order in orders
        if order.unit == "linear" and order.rest == "rotate"
    ]
    return math.lcm(*(max(1, turn) for turn in turns), *([linear_turns(nested, experts)] if nested else ()))


def number_layers(names: Iterable[str], kinds_of: KindsOf) -> dict[str, int]:
    """The number of each linear layer in the forward pass, from 0; other tensors have that of the last one before."""
    kinds = {name: kinds_of(name).kind(name) for name in names}

    def place(name: str) -> tuple[object, ...]:
        checkpoint = kinds_of(name)
        return forward_key(name, kinds[name], checkpoint.unit(name), checkpoint.rotation(name))

    count, numbers = 0, {}
    for name in sorted(kinds, key=place):
        is_layer = kinds[name] in LAYERS
        numbers[name] = count if is_layer else max(0, count - 1)
        count += is_layer
    return numbers


def describe_aliasing(names: Sequence[str], kinds_of: KindsOf, turns: int) -> Iterator[str]:
    """Notes on blocks whose number of linear layers ``turns`` divides, so that each layer keeps its first expert."""
    layers = Counter(
        unit for name in names if kinds_of(name).kind(name) in LAYERS and (unit := kinds_of(name).unit(name)) != name
    )
    sizes = Counter(layers.values())
    for size, blocks in sizes.items():
        if turns > 1 and size % turns == 0:
            yield (
                f"order: {{unit: linear}} turns {turns} experts, and {blocks} of {len(layers)} blocks have {size} "
                "linear layers, a multiple of that: the same layer of each begins with the same expert; "
                "unit: block has no such pattern"
            )
