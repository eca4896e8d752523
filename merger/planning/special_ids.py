"""Ids of special tokens in config.json and generation_config.json, which must be those of the output's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merger.checkpoint.tensor_kinds import text_config
from merger.checkpoint.tokenizers import Tokenizer

_ROLES = ("bos_token", "eos_token", "pad_token")


def special_ids(tokenizer: Tokenizer, *configs: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens by the first config that names them, else by the tokenizer; only those that are known.

    What ends a generation is one id or a list of ids, and the end token of the tokenizer is always among them.
    """
    ids: dict[str, Any] = {}
    for role in _ROLES:
        key, tokenizer_id = f"{role}_id", tokenizer.special_id(role)
        values = [text_config(config).get(key, config.get(key)) for config in configs]
        value = next((value for value in values if value is not None), tokenizer_id)
        if role == "eos_token" and tokenizer_id is not None:
            value = _with_end(value, tokenizer_id)
        ids |= {} if value is None else {key: value}
    return ids


def _with_end(value: Any, end: int) -> Any:
    ends = value if isinstance(value, list) else [value]
    return value if end in ends else [*ends, end]


def with_special_ids(config: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config with these ids, in the part about the language model and wherever else it names them."""
    inner = text_config(config)
    if inner is config:
        return {**config, **ids}
    return {**config, **{key: ids[key] for key in ids if key in config}, "text_config": {**inner, **ids}}
