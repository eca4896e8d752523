"""The names of a checkpoint's tensors, and the parameters that transformers makes of them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from merger._order import natural

if TYPE_CHECKING:
    from torch import Tensor

Renamed = tuple[str, str | None]
"""A parameter's name, and the pattern by which a converter of transformers found the tensor, if one did."""


@dataclass(frozen=True)
class WeightGroup:
    """Checkpoint tensors that together make a parameter, or several of them with a converter."""

    target: str
    sources: Mapping[str | None, tuple[str, ...]]  # by the converter's pattern, in natural order
    converter: Any | None  # transformers.core_model_loading.WeightConverter

    @property
    def names(self) -> Iterator[tuple[int, str]]:
        """Its tensors, each with its place among those of its pattern."""
        return chain.from_iterable(map(enumerate, self.sources.values()))

    def transposes(self, stored: Sequence[int], loaded: Sequence[int]) -> bool:
        """Whether its converter turns the matrices of a tensor of shape ``stored`` to make one of shape ``loaded``."""
        steps = [] if self.converter is None else self.converter.operations
        turns = [step for step in steps if type(step).__name__ == "Transpose"]
        return any(not getattr(turn, "check_dims", False) or tuple(stored) != tuple(loaded) for turn in turns)

    def convert(self, tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Returns the parameters that transformers makes of the group's tensors, by name.

        Takes the tensors out of ``tensors``, so that each can be freed as soon as the converter has used it.
        """
        if self.converter is None:
            return {self.target: next(iter(tensors.values()))}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, tensors.pop(name))
        parameters = converter.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in parameters.items()}

    @property
    def targets(self) -> list[str]:
        """All parameters that it makes."""
        if self.converter is None:
            return [self.target]
        first_pattern, *patterns = self.converter.target_patterns
        return [self.target, *(self.target.replace(first_pattern, pattern) for pattern in patterns)]


def locate(
    model: Any, names: Iterable[str], original_names: Mapping[str, str] = MappingProxyType({})
) -> dict[str, WeightGroup]:
    """Returns the checkpoint tensors that make each parameter and stored buffer of a model.

    ``original_names`` are those by which transformers knows tensors that have other ``names`` here.
    """
    parameters = model.state_dict()
    rename, converters = _transformers_5(model, parameters) or (_transformers_4(model, parameters), {})
    names_by_target: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names, key=natural):
        target, pattern = rename(original_names.get(name, name))
        if target in parameters:
            names_by_target[target][pattern].append(name)
    groups = [
        WeightGroup(
            target,
            {pattern: tuple(source_names) for pattern, source_names in sources.items()},
            converters.get(next(iter(sources))),
        )
        for target, sources in names_by_target.items()
    ]
    return {target: group for group in groups for target in group.targets}


def _transformers_4(model: Any, parameters: Container[str]) -> Callable[[str], Renamed]:
    """Before version 5 a parameter is stored under its own name, with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."

    def rename(name: str) -> Renamed:
        spellings = (name, prefix + name, name.removeprefix(prefix))
        return next((spelling for spelling in spellings if spelling in parameters), name), None

    return rename


def _transformers_5(
    model: Any, parameters: Mapping[str, Any]
) -> tuple[Callable[[str], Renamed], dict[Any, Any]] | None:
    """Returns transformers' own renaming and its converters by pattern; None before transformers 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:
        return None
    mapping = get_model_conversion_mapping(model)
    converters = [conversion for conversion in mapping if isinstance(conversion, WeightConverter)]
    renamings = [conversion for conversion in mapping if not isinstance(conversion, WeightConverter)]
    prefix = model.base_model_prefix

    def rename(name: str) -> Renamed:
        target, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
        # as in from_pretrained: a name stays if its renaming leads to no parameter
        if target not in parameters and name in parameters:
            target, pattern = rename_source_key(name, [], [], prefix, parameters)
        return target, pattern

    return rename, {pattern: conversion for conversion in converters for pattern in conversion.source_patterns}
