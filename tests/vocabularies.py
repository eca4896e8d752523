"""Tokenizer files with a few words, written as transformers writes them."""

import json
import struct
from pathlib import Path

WORDS = [f"w{i}" for i in range(12)]


def write(file, value):
    """A small file: bytes and text as they are, all else as JSON."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str | bytes) else json.dumps(value)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def added_token(i, content):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **flags, "special": True}


def tokenizer_json(words=WORDS, added=(), **parts):
    """The content of a word-level tokenizer.json, with added tokens behind its words."""
    tokens = [added_token(len(words) + i, token) for i, token in enumerate(added)]
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": words[0]}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    whitespace = {"type": "Whitespace"}
    return {"version": "1.0", **empty, "pre_tokenizer": whitespace, "added_tokens": tokens, "model": model, **parts}


def save_tokenizer(folder, words=WORDS, added=(), **config):
    """tokenizer.json and tokenizer_config.json."""
    write(Path(folder) / "tokenizer.json", tokenizer_json(words, added))
    write(Path(folder) / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})


def bpe_json(letters="abcd", merges=(("a", "b"), ("ab", "c")), *, as_text=False, **parts):
    """The content of a BPE tokenizer.json; its merges are pairs, or texts as older versions wrote them."""
    vocabulary = [*letters, *("".join(pair) for pair in merges)]
    listed = [" ".join(pair) if as_text else list(pair) for pair in merges]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocabulary)}, "merges": listed}
    return {**tokenizer_json(), "pre_tokenizer": None, "model": model, **parts}


def sentencepiece(pieces):
    """The bytes of a SentencePiece model with these pieces and falling scores."""

    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    def piece(i, text):
        return field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", -i) + bytes([3 << 3, 1])

    return b"".join(field(1, piece(i, text)) for i, text in enumerate(pieces)) + field(2, b"\x08\x01")
