"""The files of a tokenizer with added tokens of other tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merger.checkpoint.side_files import SideFile
from merger.checkpoint.tokenizers import Tokenizer, number_tokens
from merger.checkpoint.vocabulary_files import read_object

Flags = Mapping[str, Any]
"""How an added token is found in a text: single_word, lstrip, rstrip, normalized, special."""

_TOKENIZER, _CONFIG, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"


def united_tokens(tokenizer: Tokenizer, added: Mapping[str, Flags]) -> dict[int, str]:
    """The token of each id, once these are added to a readable tokenizer."""
    vocabulary = tokenizer.vocabulary
    assert vocabulary is not None, "only readable tokenizers are united"
    return number_tokens(vocabulary.tokens, [*dict(_added_tokens(tokenizer, added))])


def united_files(tokenizer: Tokenizer, added: Mapping[str, Flags]) -> dict[str, SideFile]:
    """The files of a readable tokenizer with these tokens added, in order.

    tokenizer.json lists them all; without that file, transformers takes them from the tokenizer's config.
    """
    if not added:
        return dict(tokenizer.files)
    ids = {token: i for i, token in reversed(united_tokens(tokenizer, added).items())}
    entries = [{"id": ids[token], "content": token, **flags} for token, flags in _added_tokens(tokenizer, added)]
    changed: dict[str, SideFile] = {}
    config = read_object(tokenizer.folder / _CONFIG)
    vocabulary_file = tokenizer.vocabulary_file
    if vocabulary_file is not None and vocabulary_file.name == _TOKENIZER:
        changed[_TOKENIZER] = {**read_object(vocabulary_file), "added_tokens": entries}
    if _TOKENIZER not in changed or "added_tokens_decoder" in config:
        decoder = {str(entry["id"]): {key: entry[key] for key in entry if key != "id"} for entry in entries}
        changed[_CONFIG] = {**config, "added_tokens_decoder": decoder | config.get("added_tokens_decoder", {})}
    if _ADDED in tokenizer.files:
        stored = read_object(tokenizer.files[_ADDED])
        changed[_ADDED] = {**stored, **{token: ids[token] for token in added}}
    return {**tokenizer.files, **changed}


def _added_tokens(tokenizer: Tokenizer, added: Mapping[str, Flags]) -> Iterator[tuple[str, Flags]]:
    """The added tokens that the tokenizer lists or numbers itself, then the others, in the order of their ids."""
    vocabulary = tokenizer.vocabulary
    assert vocabulary is not None, "only readable tokenizers are united"
    pieces = set(vocabulary.tokens.values()) - set(vocabulary.added)
    yield from ((token, flags) for token, flags in tokenizer.added_tokens.items() if token not in pieces)
    yield from ((token, flags) for token, flags in added.items() if token not in tokenizer.added_tokens)
