"""The compiled loops: a shared library that is built when merger is installed where there is a C compiler.

ctypes lets go of Python's lock in a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STORED = {"torch.bfloat16": "bf16", "torch.float32": "f32", "torch.float16": "f16"}
"""Dtypes of stored values in the order of pieces.c, and what counting.c calls them."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where they were not built."""
    spec = find_spec("merger.ops.kernels._native")
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:  # built for another machine
        return None


@cache
def number(name: str) -> int:
    """A constant of the library."""
    loops = library()
    assert loops is not None, "the caller has checked that it was built"
    return ctypes.c_int64.in_dll(loops, name).value


@cache
def step_numbers() -> dict[str, int]:
    """The names of the steps with their numbers in pieces.c."""
    loops = library()
    assert loops is not None, "the caller has checked that it was built"
    names = ctypes.c_char_p(ctypes.addressof(ctypes.c_char.in_dll(loops, "step_names"))).value or b""
    return {name: number for number, name in enumerate(names.decode().split())}


@cache
def stored_as(dtype: torch.dtype) -> int | None:
    """The number in pieces.c of a dtype of stored values; None for a dtype that it was built without."""
    if library() is None or str(dtype) not in STORED:
        return None
    place = list(STORED).index(str(dtype))
    return place if place < number("stored_types") else None


@cache
def _loop(name: str, count: int) -> Callable[..., int]:
    """A compiled loop that takes so many whole numbers."""
    loop = getattr(library(), name)
    loop.restype = ctypes.c_int64
    loop.argtypes = [ctypes.c_int64] * count  # an address is a whole number too
    return cast("Callable[..., int]", loop)


def call(name: str, *arguments: Tensor | int | None) -> int:
    """Calls a compiled loop with contiguous tensors, whole numbers, and None in place of an optional array."""
    numbers = [
        argument if isinstance(argument, int) else 0 if argument is None else argument.data_ptr()
        for argument in arguments
    ]
    return _loop(name, len(numbers))(*numbers)
