"""Vocabulary files of tokenizers: the token of each id, and their settings for splitting text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merger.checkpoint.sentencepiece import read_pieces
from merger.errors import UnreadableError, system_reason

VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model*", "spiece.model", "spm.model",
    "sentencepiece*.model", "*.spm", "tiktoken.model", "*.tiktoken", "tekken.json",
)  # fmt: skip
"""Patterns of the files that hold a vocabulary, in the order in which transformers prefers them."""


@dataclass(frozen=True)
class VocabularyFile:
    """The content of a vocabulary file."""

    tokens: Mapping[int, str]
    added: tuple[str, ...] = ()  # tokens that are added to these, in order
    splitting: Mapping[str, Any] = field(default_factory=dict)  # by part: merges, scores, normalizer, ...


def find_vocabulary(folder: Path) -> Path | None:
    """The vocabulary file of a folder."""
    return next((file for pattern in VOCABULARIES for file in matching_files(folder, [pattern]).values()), None)


def matching_files(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """The files of a folder that match one of the patterns, by their names in it and in order of these."""
    files = (file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    return {name: folder / name for name in sorted({file.relative_to(folder).as_posix() for file in files})}


def read_vocabulary(file: Path) -> VocabularyFile | None:
    """Reads a vocabulary file; None if it is of a kind that cannot be read here, or broken."""
    readers: dict[str, Callable[[Path], VocabularyFile | None]] = {
        "tokenizer.json": _read_tokenizer_json,
        "vocab.json": _read_vocab_json,
        "vocab.txt": _read_vocab_txt,
        "tokenizer.model": _read_sentencepiece,
        "spiece.model": _read_sentencepiece,
    }
    # Classes that read sentencepiece.bpe.model or spm.model shift the ids, each in a way of its own.
    reader = readers.get(file.name)
    return reader(file) if reader else None


def _read_tokenizer_json(file: Path) -> VocabularyFile | None:
    document = read_object(file)
    model, stored = document.get("model"), document.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocabulary, dict | list):
        return None
    added = [entry for entry in stored if isinstance(entry, dict)] if isinstance(stored, list) else []
    added_tokens = {str(entry.get("content")): {**entry, "id": None} for entry in added}
    parts = {key: document.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor")}
    parts["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    parts["added tokens"] = added_tokens
    if isinstance(vocabulary, list):
        parts["scores"] = _digest_lines(map(str, vocabulary))
    if isinstance(merges := model.get("merges"), list):
        parts["merges"] = _digest_merges(merges)
    tokens = _tokens_by_id(vocabulary)
    return None if tokens is None else VocabularyFile(tokens, tuple(added_tokens), parts)


def _read_vocab_json(file: Path) -> VocabularyFile | None:
    tokens = _tokens_by_id(read_object(file))
    merges = file.with_name("merges.txt")
    parts = {"merges": _digest_merges(_merge_lines(merges))} if merges.is_file() else {}
    return VocabularyFile(tokens, (), parts) if tokens else None


def _tokens_by_id(vocabulary: dict[str, Any] | list[Any]) -> dict[int, str] | None:
    """The tokens of an object of ids, or of a list of pairs of token and score; None where they are neither."""
    if isinstance(vocabulary, list):
        return {i: str(entry[0] if isinstance(entry, list) and entry else entry) for i, entry in enumerate(vocabulary)}
    if not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        return None
    return {i: token for token, i in vocabulary.items()}


def _read_vocab_txt(file: Path) -> VocabularyFile:
    return VocabularyFile(dict(enumerate(_lines(file))))


def _read_sentencepiece(file: Path) -> VocabularyFile | None:
    pieces = read_pieces(read_content(file))
    tokens = {i: token for i, (token, _) in enumerate(pieces)}
    scores = _digest_lines(str(score) for _, score in pieces)
    return VocabularyFile(tokens, (), {"scores of pieces": scores}) if pieces else None


def _merge_lines(file: Path) -> list[str]:
    return [line for line in _lines(file) if line.strip() and not line.startswith("#version")]


def _lines(file: Path) -> list[str]:
    text = read_content(file).decode(errors="replace").removesuffix("\n")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _digest_merges(merges: Iterable[Any]) -> str:
    """One digest for merges as pairs and for the same merges as text with a space."""
    return _digest_lines(" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in merges)


def _digest_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one where there is no file, or none that can be understood."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(read_content(file))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_content(file: Path) -> bytes:
    """Reads a small file; UnreadableError where the disk fails."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UnreadableError(f"{file}: cannot be read: {system_reason(error)}") from None
