"""The config.json of the output: the base's, with what the merge changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from merger.checkpoint.tensor_info import FLOATS
from merger.checkpoint.tensor_kinds import BLOCK_COUNTS, block_count, text_config
from merger.planning.block_map import OutputBlock

_NO_BLOCKS = ("architectures", "_token_id", "_token_ids", "mrope_section")
"""Endings of keys whose lists have an element for something else than a block."""
_BLOCK_NUMBERS = ("mlp_only_layers", "attn_layer_indices", "cross_attention_layers", "moe_layers", "global_attn_layers")
"""Keys that list the numbers of some blocks."""
_FIRST_BLOCKS = ("first_k_dense_replace", "max_window_layers")
"""Keys that say how many of the first blocks are of another kind."""
_PERIODS = (
    "sliding_window_pattern",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "no_rope_layer_interval",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "moe_layer_freq",
    "attn_layer_period",
    "expert_layer_period",
)
"""Keys by which every n-th block is of another kind."""
_SUPERSEDED = {
    "layer_types": (
        "max_window_layers",
        "sliding_window_pattern",
        "full_attention_interval",
        "global_attn_every_n_layers",
    ),
    "no_rope_layers": ("no_rope_layer_interval",),
}
"""By the key of a list with an element for each block, the keys that transformers then does not look at."""


def with_size(config: Mapping[str, Any], *, dtype: str | None, rows: int | None) -> dict[str, Any]:
    """The config with this dtype and number of rows of the vocabulary; None leaves what the config says."""
    sized = dict(config)
    inner = dict(text_config(config)) if text_config(config) is not config else sized
    if rows is not None and "vocab_size" in inner:
        inner["vocab_size"] = rows
    if dtype:
        for key in {"dtype", "torch_dtype"} & set(sized) or {"dtype"}:
            sized[key] = dtype
    if inner is not sized:
        sized["text_config"] = inner
    return sized


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype of floats in which config.json says that a model is meant to run; None where it does not say."""
    parts = (config, text_config(config))
    dtypes = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    return next((dtype for dtype in dtypes if dtype in FLOATS.values()), None)


# --- blocks in another order ----------------------------------------------------------------------


class BlockSettings:
    """The settings of config.json for single blocks, for the output's blocks as `layers` put them in order."""

    def __init__(self, blocks: Sequence[OutputBlock], configs: Mapping[str, Mapping[str, Any]]) -> None:
        self._blocks = blocks
        self._configs = {label: {**config, **text_config(config)} for label, config in configs.items()}
        self._counts = {label: block_count(config) for label, config in configs.items()}
        self.faults: list[str] = []
        self.notes: list[str] = []

    def rewritten(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The base's config for the output's blocks; fills `faults` and `notes`."""
        if not self._blocks:
            return dict(config)
        inner = text_config(config)
        if inner is config:
            return self._part(config)
        return {**self._part(config), "text_config": self._part(inner)}

    def _part(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """One part of the config with the settings of the output's blocks."""
        superseded = {key for name, keys in _SUPERSEDED.items() if config.get(name) for key in keys}
        superseded |= set() if config.get("use_sliding_window") else {"max_window_layers"}
        return {
            key: value if key in superseded or value is None else self._setting(key, value)
            for key, value in config.items()
        }

    def _setting(self, key: str, value: Any) -> Any:
        count = self._counts["base"]
        if key in BLOCK_COUNTS and value == count:
            return len(self._blocks)
        if key in _BLOCK_NUMBERS and isinstance(value, list):
            return [i for i, block in enumerate(self._blocks) if self._number(block) in self._of(block, key, list)]
        if key == "attention_types":  # GPT-Neo's short form of attention_layers, [[kinds, repeats], ...]
            return [[self._by_block(key, _spelled_out), 1]]
        if type(value) is int and key in (*_FIRST_BLOCKS, *_PERIODS):
            return self._first_blocks(key, value) if key in _FIRST_BLOCKS else self._period(key, value)
        if key == "hybrid_override_pattern":  # Nemotron-H's kinds of blocks, a letter each
            return "".join(self._by_block(key, list))
        return self._by_block(key, list) if self._is_by_block(key, value) else value

    def _is_by_block(self, key: str, value: Any) -> bool:
        """Whether a setting is a list with an element for each block, and not as long by chance."""
        if not isinstance(value, list) or len(value) != self._counts["base"] or key.endswith(_NO_BLOCKS):
            return False
        return not any(
            self._configs[label].get(key) == value and count != len(value) for label, count in self._counts.items()
        )

    def _by_block(self, key: str, spell: Callable[[Any], list[Any]]) -> list[Any]:
        """The elements of a setting for the output's blocks, from a setting with one for each block of a model."""
        differing: dict[str, str] = {}
        elements = []
        for i, block in enumerate(self._blocks):
            label, number = block.origin
            entries = {name: self._elements(name, key, spell) for name in block.sources}
            if number >= len(entries[label]):
                self.faults.append(f"{label}: config.json has no {key} for each block, which base has")
                return []
            elements.append(entries[label][number])
            for name, source in block.sources.items():
                if source < len(entries[name]) and entries[name][source] != elements[-1]:
                    differing.setdefault(name, f"{entries[name][source]!r} instead of {elements[-1]!r} in block {i}")
        self.notes += [
            f"{name}: its {key} differs from that of the output, which is base's: {text}"
            for name, text in differing.items()
        ]
        return elements

    def _first_blocks(self, key: str, value: int) -> int:
        """How many of the output's first blocks are of the first kind; a fault where such a block is behind another."""
        are_first = [self._number(block) < self._of(block, key, int) for block in self._blocks]
        if are_first != sorted(are_first, reverse=True):
            self.faults.append(_describe_other_kind(key, value))
        return sum(are_first) if False in are_first else max(value, len(are_first))

    def _period(self, key: str, value: int) -> int:
        """The setting, unchanged; a fault where a block has another place in the period than in its model."""
        places = [self._number(block) % max(1, self._of(block, key, int)) for block in self._blocks]
        if places != [i % max(1, value) for i in range(len(places))]:
            self.faults.append(_describe_other_kind(key, value))
        return value

    def _number(self, block: OutputBlock) -> int:
        return block.origin[1]

    def _of(self, block: OutputBlock, key: str, kind: type) -> Any:
        """The setting of the model that a block comes from; that of the base where the model has none."""
        value = self._configs[block.origin[0]].get(key)
        return value if isinstance(value, kind) else self._configs["base"][key]

    def _elements(self, label: str, key: str, spell: Callable[[Any], list[Any]]) -> list[Any]:
        value = self._configs[label].get(key)
        return spell(value) if isinstance(value, str | list) else []


def _describe_other_kind(key: str, value: int) -> str:
    return (
        f"config.json gives a block its kind by its number ({key}: {value}), and `layers` give that number to a block "
        "of another kind; move blocks so that each stays of its kind"
    )


def _spelled_out(types: list[Any]) -> list[Any]:
    """GPT-Neo's attention types with an element for each block."""
    return list(_repeated(types))


def _repeated(types: list[Any]) -> Iterator[Any]:
    for kinds, repeats in types:
        yield from kinds * repeats
