"""Arrays that are expressions: pieces.c computes a whole chain of operations on a slice at once, a piece at a time.

A `Lazy` stands in for a tensor. An operation that pieces.c knows makes a longer expression; any other computes the
tensor first. So a chain of differences, masks, sums and roundings goes through memory once, from stored values to
stored values, and a result that nothing reads is not computed.

An expression reads the memory of the arrays that it was made from when it is computed, so none of them may change
before. A change in place of an expression is refused; one of a tensor, or of a view, is noticed by torch's version
count and refused when the expression is computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from merger._lazy import torch
from merger.ops.kernels.steps import InPlaceError, Step, carry_out, constant, constant_bits

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = "assign the result to a new name instead, as in `deltas = deltas * 10`"
OPERATORS = [
    "add",
    "and",
    "div",
    "floordiv",
    "lshift",
    "matmul",
    "mod",
    "mul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
]
IN_PLACE_OPERATORS = frozenset(f"__i{name}__" for name in OPERATORS)


def changes_in_place(name: str) -> bool:
    """Whether a tensor's method of this name changes the tensor itself: mul_, __imul__, __setitem__."""
    return name == "__setitem__" or name in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


class Lazy:
    """A float32 or bool array [k r c] or [r c] on the CPU: one expression for each of the k experts, or one in all."""

    __slots__ = ("_tensor", "dtype", "shape", "steps")
    is_cpu = True

    def __init__(self, steps: Sequence[Step], shape: Sequence[int], *, mask: bool = False) -> None:
        self.steps = tuple(steps)
        self.shape: torch.Size = torch.Size(shape)
        self.dtype = torch.bool if mask else torch.float32
        self._tensor: Tensor | None = None

    @classmethod
    def of(cls, values: Array) -> Lazy:
        """Returns an expression that loads a float32 or bool tensor; an expression is returned as it is."""
        if isinstance(values, Lazy):
            return values
        values = values.contiguous()
        rows = values.flatten(1) if values.dim() == 3 else [values]
        array = cls([Step("LOAD") for _ in rows], values.shape, mask=values.dtype == torch.bool)
        for step, row in zip(array.steps, rows, strict=True):
            step.is_in(row)
        array._tensor = values
        return array

    def tensor(self) -> Tensor:
        """Returns the values as a tensor; they are computed once."""
        if self._tensor is None:
            self._tensor = torch.empty(self.shape, dtype=self.dtype)
            rows = self._tensor.view(len(self.steps), self.size)
            store = "STORE_MASK" if self.dtype == torch.bool else "STORE"
            sinks = [Step(store, step, numbers=(row.data_ptr(),)) for step, row in zip(self.steps, rows, strict=True)]
            carry_out(sinks, self.size)
            for step, row in zip(self.steps, rows, strict=True):
                step.is_in(row)
        return self._tensor

    @property
    def size(self) -> int:
        """The number of elements of a row."""
        return self.numel() // max(1, len(self.steps))

    # --- the interface of a tensor ---

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def numel(self) -> int:
        """The number of elements of all rows."""
        return self.shape.numel()

    def dim(self) -> int:
        """The number of dimensions, 2 or 3."""
        return len(self.shape)

    def float(self) -> Array:
        """Returns itself; a mask as zeros and ones."""
        return self if self.dtype == torch.float32 else self.tensor().float()

    def to(self, *args: Any, **kwargs: Any) -> Array:
        """Returns itself where dtype and device are the same."""
        is_type_or_device = not kwargs and len(args) == 1 and isinstance(args[0], torch.dtype | torch.device)
        unchanged = is_type_or_device and args[0] in (self.dtype, self.device)
        return self if unchanged else self.tensor().to(*plain(args), **plain(kwargs))

    def view(self, *shape: Any) -> Array:
        """Returns itself for its own shape, a tensor for any other."""
        return self if shape in (self.shape, (self.shape,)) else self.tensor().view(*shape)

    def square(self) -> Lazy:
        """Returns the squares."""
        return self._made(Step("MULTIPLY", step, step) for step in self.steps)

    def abs(self) -> Lazy:
        """Returns the absolute values: without the sign bit."""
        return self._made(Step("AND", step, constant_bits(0x7FFFFFFF)) for step in self.steps)

    def at_least(self, limit: Operand) -> Array:
        """Returns a mask of the elements that are at least ``limit``."""
        return self._with("AT_LEAST", limit, operator.ge, mask=True)

    def __mul__(self, operand: Operand) -> Array:
        if isinstance(operand, float) and operand == 1:
            return self
        return self._with("MULTIPLY", operand, operator.mul)

    __rmul__ = __mul__

    def __truediv__(self, operand: Operand) -> Array:
        return self._with("DIVIDE", operand, operator.truediv)

    def __add__(self, operand: Operand) -> Array:
        return self._with("ADD", operand, operator.add)

    __radd__ = __add__

    def __sub__(self, operand: Operand) -> Array:
        return self._with("SUBTRACT", operand, operator.sub)

    def __rsub__(self, operand: Operand) -> Array:
        if isinstance(operand, int | float) and self.dtype == torch.float32:
            return self._made(Step("SUBTRACT", constant(operand), step) for step in self.steps)
        return plain(operand) - self.tensor()

    def __and__(self, operand: Operand) -> Array:
        return self._with("AND", operand, operator.and_, mask=True)

    __rand__ = __and__

    def __or__(self, operand: Operand) -> Array:
        return self._with("OR", operand, operator.or_, mask=True)

    __ror__ = __or__

    def __invert__(self) -> Lazy:
        return self._made((Step("NOT", step) for step in self.steps), mask=True)

    def __ne__(self, operand: Operand) -> Array:  # type: ignore[override]
        if self.dtype == torch.float32 and isinstance(operand, int) and operand == 0:
            return self._made((Step("NONZERO", step) for step in self.steps), mask=True)
        return self.tensor() != plain(operand)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        if self.dim() == 2 and index is None:
            return Lazy(self.steps, (1, *self.shape), mask=self.dtype == torch.bool)
        if self.dim() == 3 and isinstance(index, int):
            return Lazy([self.steps[index]], self.shape[1:], mask=self.dtype == torch.bool)
        if self.dim() == 3 and isinstance(index, slice):
            steps = self.steps[index]
            return Lazy(steps, (len(steps), *self.shape[1:]), mask=self.dtype == torch.bool)
        return self.tensor()[plain(index)]

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if changes_in_place(name):
            raise InPlaceError(f"{name} would change an array that other expressions may read; {REMEDY}")
        return getattr(self.tensor(), name)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise InPlaceError(f"assigning to a part would change an array that other expressions may read; {REMEDY}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if (isinstance(args[0], Lazy) and changes_in_place(name)) or isinstance((kwargs or {}).get("out"), Lazy):
            raise InPlaceError(f"torch.{name} would change an array that other expressions may read; {REMEDY}")
        if name in ("mul", "__mul__", "__rmul__") and isinstance(args[1], Lazy) and not kwargs:
            return args[1] * args[0]
        if (
            name in ("stack", "cat")
            and len(args) == 1
            and not kwargs
            and all(array.dim() == 2 + (name == "cat") for array in args[0])
        ):
            return stacked(args[0])
        return func(*plain(args), **plain(kwargs or {}))

    def _made(self, steps: Iterable[Step], *, mask: bool = False) -> Lazy:
        return Lazy(tuple(steps), self.shape, mask=mask)

    def _with(
        self, name: str, operand: Operand, as_torch: Callable[[Tensor, Number], Tensor], *, mask: bool = False
    ) -> Array:
        """Adds an operation with ``operand``, or computes it by ``as_torch`` where pieces.c cannot."""
        if isinstance(operand, Lazy) and operand.dim() == 3 and operand.shape[1:] == self.shape:
            return Lazy(self.steps * len(operand), operand.shape)._with(name, operand, as_torch, mask=mask)
        rows = self._rows_of(operand)
        if rows is None:
            return as_torch(self.tensor(), plain(operand))
        pairs = zip(self.steps, rows, strict=True)
        return self._made((Step(name, step, operand_step) for step, operand_step in pairs), mask=mask)

    def _rows_of(self, operand: Operand) -> Sequence[Step] | None:
        """A step for each row, from a number or an array of the same dtype and a shape that fits; else None."""
        k = len(self.steps)
        if isinstance(operand, int | float):
            return [constant(operand)] * k if self.dtype == torch.float32 else None
        if not isinstance(operand, Lazy | torch.Tensor) or operand.dtype != self.dtype or not operand.is_cpu:
            return None
        if operand.shape == self.shape or (self.dim() == 3 and operand.shape == self.shape[1:]):
            rows = Lazy.of(operand).steps
        elif self.dim() != 3:
            return None
        elif operand.shape == (k, 1, 1):
            rows = tuple(constant(value) for value in operand.flatten().tolist())
        elif operand.dim() == 3 and len(operand) in (1, k) and operand.shape[1:] == (1, self.shape[-1]):
            rows = tuple(_columns(row) for row in plain(operand).contiguous().view(len(operand), -1))
        else:
            return None
        return rows if len(rows) == k else rows * k


Array: TypeAlias = "Tensor | Lazy"
"""Weights, scores or masks of a slice: in memory, or as an expression that is computed when they are needed."""
Number: TypeAlias = "Tensor | float"
Operand: TypeAlias = "Array | float"


def _columns(row: Tensor) -> Step:
    """The ``row`` [c], repeated for every row of the slice."""
    return Step("COLUMNS", numbers=(row.data_ptr(), len(row)), memory=row)


def stacked(arrays: Sequence[Array]) -> Lazy:
    """Stacks arrays [r c] or [k r c] to one [k r c]."""
    lazy_arrays = [Lazy.of(array) for array in arrays]
    steps = [step for array in lazy_arrays for step in array.steps]
    return Lazy(steps, (len(steps), *lazy_arrays[0].shape[-2:]), mask=lazy_arrays[0].dtype == torch.bool)


@overload
def plain(value: Array) -> Tensor: ...
@overload
def plain(value: float) -> float: ...
@overload
def plain(value: None) -> None: ...
@overload
def plain(value: Any) -> Any: ...


def plain(value: Any) -> Any:
    """Returns the value with a tensor in place of every expression, also within lists, tuples and maps."""
    if isinstance(value, Lazy):
        return value.tensor()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return type(value)(map(plain, value)) if type(value) in (tuple, list) else value


def _as_torch_does(name: str) -> Any:
    return lambda self, *operands: getattr(self.tensor(), name)(*plain(operands))


for _name in ("rtruediv", "neg", "abs", "pow", "matmul", "rmatmul", "eq", "lt", "le", "gt", "ge", "bool"):
    setattr(Lazy, f"__{_name}__", _as_torch_does(f"__{_name}__"))
