"""Modules of a multimodal base, such as a vision tower, of which experts that are language models have nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from merger.checkpoint.tensor_kinds import TensorKinds, block_name

_PARTS = ("text_config", "vision_config", "audio_config")


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a config describes a language model together with other models."""
    return any(isinstance(config.get(part), Mapping) for part in _PARTS)


def tower_tensors(kinds: Mapping[str, TensorKinds]) -> dict[str, str]:
    """The base's tensors in modules beside the language model, each with its module; none unless no expert has such."""
    base, *experts = kinds.values()
    if not experts or not is_multimodal(base.config) or any(is_multimodal(expert.config) for expert in experts):
        return {}
    shared = {name for expert in experts for name in expert.tensors if name in base.tensors}
    prefixes = {prefix for name in shared for prefix in _prefixes(name)}
    language_models = {block.stack.rpartition(".")[0] for name in shared if (block := block_name(name)) is not None}
    towers = {}
    for name in base.tensors.keys() - shared - {base.embedding, base.head}:
        tower = next(prefix for prefix in _prefixes(name) if prefix not in prefixes)
        if not any(f"{tower}.".startswith(f"{model}." if model else "") for model in language_models):
            towers[name] = tower
    return towers


def tower_notes(towers: Mapping[str, str]) -> Iterator[str]:
    """A note on each module that is copied."""
    for tower, count in sorted(Counter(towers.values()).items()):
        tensors = "its tensor is" if count == 1 else f"its {count:,} tensors are"
        yield f"base: no expert has {tower}: {tensors} copied"


def _prefixes(name: str) -> Iterator[str]:
    """A tensor's module of the first level, the module in it, and so on to the tensor's own name."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))
