"""A stored tensor's dtype, shape and place, in the names that safetensors gives to dtypes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from merger._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    ReadRows = Callable[["Info", int, int], Tensor]

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8,
}  # fmt: skip
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TORCH_NAMES = FLOATS | {
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}


class Info(NamedTuple):
    """One stored tensor: its dtype and shape, and the place of its bytes.

    A tuple, for a large mixture has two hundred thousand, and a frozen dataclass takes three times as long to make.
    """

    dtype: str  # as safetensors writes it: BF16, F32, I64, ...
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0  # of its first byte in the file
    strides: tuple[int, ...] | None = None  # between its elements, where a pickle stores it out of row order
    pieces: tuple[Piece, ...] = ()  # rows of stored tensors that it is made of; its place is then that of the first
    code: Code | None = None  # how it is decoded, where codes are stored in place of its numbers

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.elements * ITEM_SIZE[self.dtype]

    @property
    def stored_size(self) -> float:
        """The bytes of a stored number, of those of codes and scales the mean."""
        if self.code is None:
            return ITEM_SIZE[self.dtype]
        return sum(part.nbytes for part in self.code.parts) / max(1, self.elements)

    @property
    def is_float(self) -> bool:
        """Whether it holds numbers that can be merged."""
        return self.dtype in FLOATS

    @property
    def is_plain(self) -> bool:
        """Whether its numbers lie in one place of a file, one after another in row order."""
        return self.strides is None and not self.pieces and self.code is None

    @property
    def files(self) -> Iterator[Path]:
        """The files that hold it; none where only its header is at hand."""
        parts = [piece.tensor for piece in self.pieces] or ([] if self.code is None else list(self.code.parts))
        if not parts:
            return iter(() if self.file is None else (self.file,))
        return (file for part in parts for file in part.files)

    @property
    def matrix(self) -> tuple[int, int]:
        """Its rows and columns, as `rows_and_columns` counts them."""
        return rows_and_columns(self.shape)


class Code(ABC):
    """The way from stored codes, and scales beside them, to the float32 numbers of a weight."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Info, ...]:
        """The stored tensors that the weight is made of."""

    @abstractmethod
    def read_into(self, rows: Tensor, start: int, stop: int, read: ReadRows) -> None:
        """Reads rows ``start`` to ``stop`` of the weight into ``rows`` [r c]; ``read`` is for the stored tensors."""


class Piece(NamedTuple):
    """Rows of a stored tensor, as a part of a tensor whose parts are stored apart."""

    tensor: Info
    start: int
    stop: int


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """All axes but the last as rows, and the last as columns; a vector or a number is one row."""
    return (prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, prod(shape))


def torch_dtype(info: Info) -> torch.dtype:
    """Returns torch's dtype of a stored tensor."""
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
    return dtype


def checked_name(name: str) -> str:
    """A tensor's name, if a terminal, a log and a JSON file can carry it; ValueError otherwise."""
    if not name.isprintable():  # line breaks, escape sequences, lone surrogates
        raise ValueError(f"the name {name!r} has characters that cannot be printed")
    return name
