"""The side files of the output: config, tokenizer, and other files that transformers reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.side_files import SideFile, base_files
from merger.checkpoint.tokenizers import Tokenizer
from merger.checkpoint.united_tokenizer import Flags, united_files
from merger.checkpoint.vocabulary_files import read_object
from merger.planning.special_ids import special_ids, with_special_ids

_GENERATION = "generation_config.json"


def plan_side_files(
    base: Checkpoint,
    tokenizer_model: Checkpoint,
    tokenizer: Tokenizer,
    config: Mapping[str, Any],
    added: Mapping[str, Flags],
) -> dict[str, SideFile]:
    """All files beside the weights, given the output's config and the model whose tokenizer the output gets.

    Tokens are ``added`` to that tokenizer, in this order.
    That model's settings for generation come with its tokenizer; where it has none, those of the base name its tokens.
    """
    files: dict[str, SideFile] = {**base_files(base.directory), **united_files(tokenizer, added), "config.json": config}
    file, base_file = tokenizer_model.directory / _GENERATION, base.directory / _GENERATION
    if tokenizer_model is base or file.is_file():
        settings = read_object(file)
        ids = {} if tokenizer_model is base else special_ids(tokenizer, settings, tokenizer_model.config)
        ids = {key: ids[key] for key in ids if key == "eos_token_id"}
        return files | _with_ids(file, settings, ids)
    return files | _with_ids(base_file, read_object(base_file), special_ids(tokenizer, tokenizer_model.config))


def _with_ids(file: Path, settings: Mapping[str, Any], ids: Mapping[str, Any]) -> dict[str, SideFile]:
    """generation_config.json with these ids: the file itself where it has them already; nothing where there is none."""
    if not file.is_file():
        return {}
    changed = with_special_ids(settings, ids)
    return {_GENERATION: changed if changed != settings else file}
