"""pytorch_model.bin: names, dtypes, shapes and places of the tensors that `torch.save` wrote, and nothing executed.

The pickle in such a file is read by an unpickler that knows the names that tensors are made of and gives each
an inert stand-in; whatever else the file asks for is refused. `torch.load(weights_only=True, mmap=True)` refuses as
much, but it needs the whole file (the plan of a Hub repository would download 26 GB where a few range requests
do), it cannot map files from before torch 1.6, and what is read through its mapping stays resident: 512 MB read
in slices made the process 519 MB larger, and 5 MB larger here (torch 2.13). A tensor whose place in the file is
known can be read like one of safetensors.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from merger._lazy import torch
from merger.checkpoint.disk import CHUNK
from merger.checkpoint.formats.interface import (
    Fill,
    Format,
    Scan,
    count_not_finite,
    fill_from,
    read_numbers,
)
from merger.checkpoint.tensor_info import ITEM_SIZE, Info, checked_name, torch_dtype
from merger.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE = 16 << 20  # names and shapes of 100,000 tensors

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# An unpickler that is fed nonsense raises whatever it stumbles over (a Warning, where Python is told to).
_STUMBLES = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, ArithmeticError, AttributeError, EOFError,
    LookupError, MemoryError, NotImplementedError, RecursionError, TypeError, ValueError, Warning,
)  # fmt: skip


class _Storage(NamedTuple):
    """A run of numbers that tensors are views of."""

    key: str
    dtype: str
    length: int


class _View(NamedTuple):
    """A tensor, as a pickle says it."""

    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Pickle(Format):
    """The format of `torch.save`, as an archive since torch 1.6 and as one pickle after another before it."""

    order = 1
    suffix = ".bin"
    model = "pytorch_model.bin"
    adapter = "adapter_model.bin"

    def parse(self, file: IO[bytes], size: int, path: Path, *, with_offsets: bool = True) -> dict[str, Info]:
        """Reads and checks names, dtypes and shapes; reads no bytes between tensors without ``with_offsets``."""
        try:
            read = _read_archive if zipfile.is_zipfile(file) else _read_legacy
            file.seek(0)
            views, starts = read(file, size, with_offsets)
            return {checked_name(name): _info(view, path, starts) for name, view in views.items()}
        except _STUMBLES as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(
                f"{path}: is not a file of plain tensors by torch.save, or damaged: {reason}; "
                "download it again, or save the model as safetensors"
            ) from None

    def read_into(self, rows: Tensor, info: Info, start: int, stop: int, fill: Fill) -> None:
        """Reads rows, also of a tensor whose rows lie scattered over the file.

        Such tensors are rare, and are read completely for each slice of them.
        """
        if info.strides is None:
            super().read_into(rows, info, start, stop, fill)
            return
        extent = 1 + sum((n - 1) * step for n, step in zip(info.shape, info.strides, strict=True))
        tensor = read_numbers(info, 0, extent, fill).as_strided(info.shape, info.strides)
        rows.copy_(tensor.reshape(info.matrix)[start:stop])

    def scan(self, path: Path, header: Mapping[str, Info], tell: Callable[[int], None]) -> Scan:
        """Checks the values without a hash, since the file has bytes between its tensors."""
        not_finite: dict[str, int] = {}
        with path.open("rb") as file:
            fill = partial(fill_from, file.fileno(), path)
            for name, info in header.items():
                if bad := self._count_not_finite(info, fill):
                    not_finite[name] = bad
                tell(info.nbytes)
        return Scan(None, not_finite)

    def _count_not_finite(self, info: Info, fill: Fill) -> int:
        rows, columns = info.matrix
        step, bad = max(1, CHUNK // max(1, 8 * columns)), 0
        for start in range(0, rows if info.elements and info.is_float else 0, step):
            values = torch.empty(min(step, rows - start), columns, dtype=torch_dtype(info))
            self.read_into(values, info, start, start + len(values), fill)
            bad += count_not_finite(values)
        return bad


FORMAT = Pickle()


def _info(view: _View, path: Path, starts: Mapping[str, int]) -> Info:
    storage, start, shape, strides = view
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if prod(shape) and (start + extent > storage.length or prod(shape) > storage.length):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    offset = starts.get(storage.key, 0) + start * ITEM_SIZE[storage.dtype]
    return Info(storage.dtype, shape, path, offset, None if _in_row_order(shape, strides) else strides)


def _in_row_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return not prod(shape) or all(n == 1 or a == b for n, a, b in zip(shape, strides, expected, strict=True))


# --- the two forms of file: a zip archive since torch 1.6, one pickle after another before it ---


def _read_archive(file: IO[bytes], size: int, with_offsets: bool) -> tuple[dict[str, _View], dict[str, int]]:
    """Reads an archive of NAME/data.pkl and one member NAME/data/KEY for each storage."""
    members = {member.filename.partition("/")[2]: member for member in zipfile.ZipFile(file).infolist()}
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise ValueError("its members are compressed")
    if "byteorder" in members and _content(file, members["byteorder"], size) != b"little":
        raise ValueError("its numbers are big-endian")
    views = _state_dict(BytesIO(_content(file, members["data.pkl"], size)))
    starts = {}
    for key, count, width in _storages(views):
        storage_member = members[f"data/{key}"]
        if storage_member.file_size != count * width:
            raise ValueError(f"storage {key} should have {count * width:,} bytes, but has {storage_member.file_size:,}")
        if with_offsets:
            starts[key] = _start(file, storage_member, size)
    return views, starts


def _start(file: IO[bytes], member: zipfile.ZipInfo, size: int) -> int:
    """Where a member's bytes begin: behind its local header, whose padding the directory does not know."""
    file.seek(member.header_offset)
    signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
    start = member.header_offset + 30 + int(name) + int(extra)
    if signature != b"PK\x03\x04" or start + member.file_size > size:
        raise ValueError(f"{member.filename} does not lie where the archive's directory says")
    return start


def _content(file: IO[bytes], member: zipfile.ZipInfo, size: int) -> bytes:
    file.seek(_start(file, member, size))
    if member.file_size > MAX_PICKLE:
        raise ValueError(f"{member.filename} has {member.file_size:,} bytes")
    return file.read(member.file_size)


def _read_legacy(file: IO[bytes], size: int, with_offsets: bool) -> tuple[dict[str, _View], dict[str, int]]:
    """Reads five pickles (magic number, protocol, system, tensors, keys), then each storage behind its length."""
    head = BytesIO(file.read(MAX_PICKLE))
    if _unpickled(head) != _LEGACY_MAGIC or _unpickled(head) != _LEGACY_PROTOCOL:
        raise ValueError("it does not begin as one")
    if _unpickled(head).get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    views = _state_dict(head)
    sizes = {key: (count, width) for key, count, width in _storages(views)}
    position, starts = 0, {}
    for key in _unpickled(head):
        position = position or head.tell()
        count, width = sizes[key]
        if with_offsets:
            file.seek(position)
            if int.from_bytes(file.read(8), "little") != count:
                raise ValueError(f"storage {key} does not have the length that its tensors ask for")
        starts[key] = position + 8
        position = starts[key] + count * width
    if position > size or starts.keys() != sizes.keys():
        raise ValueError("it is truncated")
    return views, starts


# --- the pickle ---


def _state_dict(head: BytesIO) -> dict[str, _View]:
    """Returns the tensors by name; raises ValueError with the name of an entry that is no tensor."""
    state_dict = _unpickled(head)
    if type(state_dict) not in (dict, OrderedDict):
        raise ValueError(f"it holds no state dict, but an object of type {type(state_dict).__name__}")
    for name, value in state_dict.items():
        if type(name) is not str:
            raise ValueError(f"it holds an entry that is named by an object of type {type(name).__name__}")
        if type(value) is not _View:
            raise ValueError(f"its entry {name[:80]!r} is no tensor, but an object of type {type(value).__name__}")
    return dict(state_dict)


def _storages(views: Mapping[str, _View]) -> list[tuple[str, int, int]]:
    """Key, number of elements and bytes per element of every storage."""
    return [(s.key, s.length, ITEM_SIZE[s.dtype]) for s in dict.fromkeys(v.storage for v in views.values())]


def _unpickled(head: BytesIO) -> Any:
    """The next object, once its opcodes are known to ask for no more memory than the file can justify."""
    begin = head.tell()
    for opcode, argument, _ in pickletools.genops(head):
        # The memo is an array: a six-byte file can ask for 64 GB of it.
        if "PUT" in opcode.name and isinstance(argument, int) and argument > MAX_PICKLE:
            raise ValueError(f"its memo has an index of {argument:,}")
    end = head.tell()
    head.seek(begin)
    return _Unpickler(BytesIO(head.read(end - begin))).load()


class _Unpickler(pickle.Unpickler):
    """An unpickler that accepts only the objects of a state dict.

    It never hands out a function or a class that lives on: a pickle can set attributes on what it gets.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor()
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda view, requires_grad, hooks: view
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a plain tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, count, *view = pid
        # Types first: to print or to hash what a pickle has nested may take forever.
        if (type(kind), type(dtype), type(key)) != (str, str, str) or kind != "storage":
            raise ValueError("it refers to something that is no storage")
        if dtype not in ITEM_SIZE or any(field is not None for field in view):
            raise ValueError("it refers to a storage of an unknown kind")
        return _Storage(key, dtype, _checked_count(count))


def _rebuild_tensor() -> Callable[..., _View]:
    def rebuild(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> _View:
        if type(storage) is not _Storage:
            raise ValueError("a tensor in it has no storage")
        return _View(
            storage, _checked_count(start), tuple(map(_checked_count, shape)), tuple(map(_checked_count, strides))
        )

    return rebuild


def _checked_count(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**63:
        raise ValueError("a size in it is no whole number")
    return number
