"""The tokenizer in a folder: the token of each id and the splitting of text, read from its small files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.vocabulary_files import (
    VocabularyFile,
    find_vocabulary,
    matching_files,
    read_content,
    read_object,
    read_vocabulary,
)

FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.spm",
    "*.tiktoken", "tekken.json", "chat_template*", "*chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Patterns of all files that belong to a tokenizer, its chat templates included."""

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in the order in which transformers adds their tokens
_PROBE = (
    "Hello world!  Two  spaces,\ttabs\nand\n\nlines.\r\n",
    "trailing space ",
    "naïve café, Straße, ÀÉÎ, İstanbul",
    "don't they'll WE'VE 3.14159 1,000,000 2024-01-31",
    "def f(x):\n    return x**2  # x² ≠ 2·x",
    "<b>&amp;</b> http://a.b/c?d=e_f",
    "你好，世界。日本語 한국어",
    "مرحبا Привет हिन्दी 👩‍💻🙂",
    "ﬁne ＦＵＬＬ ½ e\u0301\u00a0\u200b\ufeff",
)
"""Texts that tokenizers with different normalizers or pre-tokenizers split differently.

None begins with a space: transformers 4 and 5 write Llama's tokenizers so that the library `tokenizers` treats such
texts differently, while transformers itself treats them alike.
"""


class Tokenizer:
    """The tokenizer of a folder; its files are read when their content is asked for."""

    def __init__(self, folder: Path, vocabularies: dict[str, VocabularyFile | None] | None = None) -> None:
        self.folder = folder
        self.files = tokenizer_files(folder)
        self.vocabulary_file = find_vocabulary(folder)
        self._vocabularies = {} if vocabularies is None else vocabularies  # by digest, shared with similar tokenizers

    @property
    def exists(self) -> bool:
        """Whether the folder holds a vocabulary."""
        return self.vocabulary_file is not None

    @property
    def is_readable(self) -> bool:
        """Whether the tokens can be read from the files."""
        return self.vocabulary is not None

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all files and their names: tokenizers with equal digests are equal."""
        return _digest(self.files)

    @cached_property
    def vocabulary_digest(self) -> str:
        """The SHA-256 of the files that hold the vocabulary."""
        vocabulary = self.vocabulary_file
        return _digest({n: file for n, file in self.files.items() if file == vocabulary or n == "merges.txt"})

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        """The token of each id, with those that transformers adds to the vocabulary when it loads the tokenizer."""
        if self.vocabulary is None:
            return {}
        return number_tokens(self.vocabulary.tokens, (*self.vocabulary.added, *self._added_tokens()))

    @cached_property
    def added_tokens(self) -> Mapping[str, Mapping[str, Any]]:
        """The tokens that are found in a text before it is split, with their flags, wherever they are stored."""
        decoder = self._config.get("added_tokens_decoder")
        stored = decoder.values() if isinstance(decoder, dict) else ()
        entries = [*self.splitting.get("added tokens", {}).values(), *stored]
        flags = {token: entry for entry in entries if (token := _token_of(entry)) is not None}
        roles = {*self.special_tokens.values(), *self._extra_tokens()}
        names = dict.fromkeys((*(self.vocabulary.added if self.vocabulary else ()), *self._added_tokens()))
        return {token: _flags(flags.get(token), is_special=token in roles) for token in names}

    @property
    def splitting(self) -> Mapping[str, Any]:
        """The settings that decide the splitting of text, by part; only parts that the files name."""
        return self.vocabulary.splitting if self.vocabulary is not None else {}

    @cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """The tokens with a role, by settings such as eos_token and pad_token."""
        settings = [*(f"{role}_token" for role in _ROLES), *(key for key in self._settings if key.endswith("_token"))]
        return {key: token for key in settings if (token := _token_of(self._settings.get(key))) is not None}

    def special_id(self, key: str) -> int | None:
        """The id of a token with a role, such as eos_token."""
        token = self.special_tokens.get(key)
        return None if token is None else next((i for i, name in self.tokens.items() if name == token), None)

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """The chat templates by name, in whatever file they stand."""
        configs = (self._config, read_object(self.folder / "chat_template.json"))
        stored = next((config["chat_template"] for config in configs if config.get("chat_template")), None)
        entries = stored if isinstance(stored, list) else [{"name": "default", "template": stored}]
        templates = {str(entry.get("name")): entry.get("template") for entry in entries if isinstance(entry, dict)}
        for name, file in self.files.items():
            if name.endswith(".jinja"):
                key = "default" if file.stem == "chat_template" else file.stem
                templates[key] = read_content(file).decode(errors="replace")
        return {name: text for name, text in templates.items() if isinstance(text, str)}

    @cached_property
    def vocabulary(self) -> VocabularyFile | None:
        """The content of the vocabulary file; None where it cannot be read."""
        if self.vocabulary_file is None:
            return None
        if self.vocabulary_digest not in self._vocabularies:
            self._vocabularies[self.vocabulary_digest] = read_vocabulary(self.vocabulary_file)
        return self._vocabularies[self.vocabulary_digest]

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        return read_object(self.folder / "tokenizer_config.json")

    @cached_property
    def _settings(self) -> Mapping[str, Any]:
        """tokenizer_config.json, with special_tokens_map.json where transformers still reads that."""
        if "added_tokens_decoder" in self._config:
            return self._config
        return {**self._config, **read_object(self.folder / "special_tokens_map.json")}

    def _added_tokens(self) -> Iterator[str]:
        """Tokens that stand outside the vocabulary file, in the order in which transformers adds them."""
        decoder = self._config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            entries = {int(i): _token_of(entry) for i, entry in decoder.items() if i.isdecimal()}
        else:
            stored = read_object(self.folder / "added_tokens.json")
            entries = {i: token for token, i in stored.items() if type(i) is int}
        yield from (token for _, token in sorted(entries.items()) if token is not None)
        yield from self.special_tokens.values()
        yield from self._extra_tokens()

    def _extra_tokens(self) -> Iterator[str]:
        """Special tokens without a role of their own."""
        extra = self._settings.get("extra_special_tokens") or self._settings.get("additional_special_tokens")
        extra_tokens = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else ()
        yield from (token for entry in extra_tokens if (token := _token_of(entry)) is not None)


def number_tokens(vocabulary: Mapping[int, str], added: Iterable[str]) -> dict[int, str]:
    """The token of each id, once tokens are added to a vocabulary.

    As in the library `tokenizers`, an added token takes the next id, whatever id its file names.
    """
    tokens = dict(vocabulary)
    ids = {token: i for i, token in tokens.items()}
    size, end = len(tokens), 0
    for token in added:
        if token not in ids:
            ids[token] = max(size, end)
            tokens[ids[token]] = token
        end = max(end, ids[token] + 1)
    return tokens


def open_tokenizers(folders: Mapping[str, Path]) -> dict[str, Tokenizer]:
    """The tokenizers of folders, by the same keys; a vocabulary that several have is read once."""
    vocabularies: dict[str, VocabularyFile | None] = {}
    return {label: Tokenizer(folder, vocabularies) for label, folder in folders.items()}


def tokenizer_folder(model: Checkpoint) -> Path:
    """The folder of a model's tokenizer: that of the adapter on the model, if the adapter came with a tokenizer."""
    adapter = model.adapter
    has_tokenizer = adapter is not None and find_vocabulary(adapter.directory) is not None
    return adapter.directory if adapter is not None and has_tokenizer else model.directory


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a folder's tokenizer by their names, chat templates included, code not."""
    return {name: file for name, file in matching_files(folder, FILES).items() if not name.endswith(".py")}


def splitting_differences(tokenizer: Tokenizer, reference: Tokenizer) -> list[str]:
    """The parts in which two tokenizers differ so that they split some text differently.

    Merges and scores are compared as they are. The other parts are written differently by different versions of
    transformers: where they are not the same, both tokenizers are tried on texts.
    """
    common = [name for name in tokenizer.splitting if name in reference.splitting]
    parts = [name for name in common if not _is_same(tokenizer.splitting[name], reference.splitting[name], name)]
    if {"merges", "scores", "scores of pieces"} & set(parts):
        return parts
    return [] if not parts or _split_alike(tokenizer, reference) else parts


def _is_same(content: Any, reference: Any, part: str) -> bool:
    if part == "added tokens":  # how the tokens that both have are found in a text
        return all(content[token] == reference[token] for token in content.keys() & reference.keys())
    return bool(content == reference)


def _split_alike(tokenizer: Tokenizer, reference: Tokenizer) -> bool:
    """Whether two tokenizer.json give the same ids for the texts of the probe."""
    from tokenizers import Tokenizer as Splitter

    try:
        splitters = [Splitter.from_file(str(file)) for file in (tokenizer.vocabulary_file, reference.vocabulary_file)]
        return all(len({tuple(splitter.encode(text).ids) for splitter in splitters}) == 1 for text in _PROBE)
    except Exception:  # the library raises plain exceptions for files that it cannot load
        return False


def _flags(entry: Any, *, is_special: bool) -> dict[str, Any]:
    """The flags of an added token, as its entry gives them; the library's defaults where it gives none."""
    stored = entry if isinstance(entry, dict) else {}
    special = bool(stored.get("special", is_special))
    flags = {key: bool(stored.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
    return {**flags, "normalized": bool(stored.get("normalized", not special)), "special": special}


def _token_of(entry: Any) -> str | None:
    """A token that is written as text, or as an object with its content."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _digest(files: Mapping[str, Path]) -> str:
    lines = [f"{name}\0{hashlib.sha256(read_content(file)).hexdigest()}\n" for name, file in files.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
