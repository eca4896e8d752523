"""Names: what a checkpoint calls its tensors, and the parameters that transformers makes of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from merger.pipeline.stages import natural

Renamed = tuple[str, str | None]
"""A parameter's name, and the pattern by which a converter of transformers found the tensor, if one did."""


@dataclass(frozen=True)
class Group:
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

    @property
    def targets(self) -> list[str]:
        """All parameters that it makes."""
        if self.converter is None:
            return [self.target]
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]


def locate(model: Any, names: Iterable[str]) -> dict[str, Group]:
    """What each parameter and stored buffer of a model is made of."""
    known = model.state_dict()
    rename, converters = _transformers_5(model, known) or (_transformers_4(model, known), {})
    found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names, key=natural):
        target, pattern = rename(name)
        if target in known:
            found[target][pattern].append(name)
    groups = [
        Group(target, {pattern: tuple(each) for pattern, each in sources.items()}, converters.get(next(iter(sources))))
        for target, sources in found.items()
    ]
    return {target: group for group in groups for target in group.targets}


def _transformers_4(model: Any, known: Container[str]) -> Callable[[str], Renamed]:
    """Before version 5 a parameter is stored under its own name, with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."

    def rename(name: str) -> Renamed:
        spellings = (name, prefix + name, name.removeprefix(prefix))
        return next((each for each in spellings if each in known), name), None

    return rename


def _transformers_5(model: Any, known: Mapping[str, Any]) -> tuple[Callable[[str], Renamed], dict[Any, Any]] | None:
    """The renaming that transformers itself does, and its converters by pattern; None if it has no such thing."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:
        return None
    mapping = get_model_conversion_mapping(model)
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    renamings = [each for each in mapping if not isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix

    def rename(name: str) -> Renamed:
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:  # as in from_pretrained: what was renamed in vain keeps its name
            target, pattern = rename_source_key(name, [], [], prefix, known)
        return target, pattern

    return rename, {pattern: each for each in converters for pattern in each.source_patterns}
