"""The pieces of a SentencePiece model, read from its protocol buffer without the library."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def read_pieces(content: bytes) -> list[tuple[str, float]]:
    """The pieces in order of their ids, each with its score; none where the content is no SentencePiece model."""
    try:
        return [_read_piece(value) for field, value in _fields(content) if field == 1 and isinstance(value, bytes)]
    except (IndexError, ValueError, struct.error):
        return []


def _read_piece(content: bytes) -> tuple[str, float]:
    """ModelProto.SentencePiece: its text is field 1, its score field 2."""
    fields = dict(_fields(content))
    text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece is text with a score")
    return text.decode(), struct.unpack("<f", score)[0]


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: their numbers, and their values as integers or as bytes."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, position = _varint(content, position)
            yield key >> 3, value
            continue
        if wire_type == _BYTES:
            size, position = _varint(content, position)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"there is no wire type {wire_type}")
        if position + size > len(content):
            raise ValueError("a field ends behind its message")
        yield key >> 3, content[position : position + size]
        position += size


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and the position behind it."""
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
