"""The config.json of the output: the base's, with what the merge changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merger.checkpoint.tensor_kinds import text_config


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
