"""Arrays that are expressions: what methods make of a slice is computed in one go, a piece at a time, by pieces.c.

A `Lazy` stands where a tensor would. What is asked of it that pieces.c can do makes a longer expression, and
anything else makes the tensor first. So a chain of differences, masks, sums and roundings goes through memory once, as
stored values that are read and others that are written, and what nobody looks at is not computed.
It must not be changed in place, nor a tensor that it was made from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.ops.kernels.steps import Step, carry_out, constant, constant_bits

if TYPE_CHECKING:
    from torch import Tensor


class Lazy:
    """A float32 or bool array [k r c] or [r c] on the CPU, by rows: an expression for each of k experts, or one."""

    __slots__ = ("_tensor", "dtype", "shape", "steps")
    is_cpu = True

    def __init__(self, steps: Sequence[Step], shape: Sequence[int], *, mask: bool = False) -> None:
        self.steps = tuple(steps)
        self.shape: torch.Size = torch.Size(shape)
        self.dtype = torch.bool if mask else torch.float32
        self._tensor: Tensor | None = None

    @classmethod
    def of(cls, values: Any) -> Lazy:
        """A tensor of float32 or bool in memory as an expression, unless it is one."""
        if isinstance(values, Lazy):
            return values
        values = values.contiguous()
        rows = values.flatten(1) if values.dim() == 3 else [values]
        made = cls([Step("LOAD") for _ in rows], values.shape, mask=values.dtype == torch.bool)
        for step, row in zip(made.steps, rows, strict=True):
            step.is_in(row)
        made._tensor = values
        return made

    def tensor(self) -> Tensor:
        """The values in memory; computed once."""
        if self._tensor is None:
            self._tensor = torch.empty(self.shape, dtype=self.dtype)
            rows = self._tensor.view(len(self.steps), self.size)
            store = "STORE_MASK" if self.dtype == torch.bool else "STORE"
            sinks = [Step(store, each, told=(row.data_ptr(),)) for each, row in zip(self.steps, rows, strict=True)]
            carry_out(sinks, self.size)
            for step, row in zip(self.steps, rows, strict=True):
                step.is_in(row)
        return self._tensor

    @property
    def size(self) -> int:
        """Elements of a row."""
        return self.numel() // max(1, len(self.steps))

    # --- what is asked of a tensor ---

    @property
    def device(self) -> torch.device:
        """Where it would be."""
        return torch.device("cpu")

    def numel(self) -> int:
        """Elements of all rows."""
        return self.shape.numel()

    def dim(self) -> int:
        """2 or 3."""
        return len(self.shape)

    def float(self) -> Any:
        """Itself, or a mask as numbers."""
        return self if self.dtype == torch.float32 else self.tensor().float()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where it is that already."""
        known = not kwargs and len(args) == 1 and isinstance(args[0], torch.dtype | torch.device)
        same = known and args[0] in (self.dtype, self.device)
        return self if same else self.tensor().to(*plain(args), **plain(kwargs))

    def view(self, *shape: Any) -> Any:
        """Itself in the form that it has, a tensor in any other."""
        return self if shape in (self.shape, (self.shape,)) else self.tensor().view(*shape)

    def square(self) -> Lazy:
        """Each times itself."""
        return self._made(Step("MULTIPLY", each, each) for each in self.steps)

    def abs(self) -> Lazy:
        """Without the sign bit."""
        return self._made(Step("AND", each, constant_bits(0x7FFFFFFF)) for each in self.steps)

    def at_least(self, limit: Any) -> Any:
        """Where it is ``limit`` or more."""
        return self._with("AT_LEAST", limit, operator.ge, mask=True)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, float) and other == 1:
            return self
        return self._with("MULTIPLY", other, operator.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._with("DIVIDE", other, operator.truediv)

    def __add__(self, other: Any) -> Any:
        return self._with("ADD", other, operator.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._with("SUBTRACT", other, operator.sub)

    def __rsub__(self, other: Any) -> Any:
        if isinstance(other, int | float) and self.dtype == torch.float32:
            return self._made(Step("SUBTRACT", constant(other), each) for each in self.steps)
        return plain(other) - self.tensor()

    def __and__(self, other: Any) -> Any:
        return self._with("AND", other, operator.and_, mask=True)

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        return self._with("OR", other, operator.or_, mask=True)

    __ror__ = __or__

    def __invert__(self) -> Lazy:
        return self._made((Step("NOT", each) for each in self.steps), mask=True)

    def __ne__(self, other: Any) -> Any:
        if self.dtype == torch.float32 and isinstance(other, int) and other == 0:
            return self._made((Step("NONZERO", each) for each in self.steps), mask=True)
        return self.tensor() != plain(other)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if self.dim() == 2 and index is None:
            return Lazy(self.steps, (1, *self.shape), mask=self.dtype == torch.bool)
        if self.dim() == 3 and isinstance(index, int):
            return Lazy([self.steps[index]], self.shape[1:], mask=self.dtype == torch.bool)
        if self.dim() == 3 and isinstance(index, slice):
            chosen = self.steps[index]
            return Lazy(chosen, (len(chosen), *self.shape[1:]), mask=self.dtype == torch.bool)
        return self.tensor()[plain(index)]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("mul", "__mul__", "__rmul__") and isinstance(args[1], Lazy) and not kwargs:
            return args[1] * args[0]
        if (
            name in ("stack", "cat")
            and len(args) == 1
            and not kwargs
            and all(each.dim() == 2 + (name == "cat") for each in args[0])
        ):
            return stacked(args[0])
        return func(*plain(args), **plain(kwargs or {}))

    def _made(self, steps: Iterable[Step], *, mask: bool = False) -> Lazy:
        return Lazy(tuple(steps), self.shape, mask=mask)

    def _with(self, name: str, other: Any, as_torch: Callable[[Any, Any], Any], *, mask: bool = False) -> Any:
        """Row by row with ``other``, or ``as_torch`` does it where pieces.c cannot."""
        if isinstance(other, Lazy) and other.dim() == 3 and other.shape[1:] == self.shape:
            return Lazy(self.steps * len(other), other.shape)._with(name, other, as_torch, mask=mask)
        rows = self._rows_of(other)
        if rows is None:
            return as_torch(self.tensor(), plain(other))
        return self._made((Step(name, own, beside) for own, beside in zip(self.steps, rows, strict=True)), mask=mask)

    def _rows_of(self, other: Any) -> Sequence[Step] | None:
        """A step for each own row, of a number or of what has the same dtype and a form that fits."""
        k = len(self.steps)
        if isinstance(other, int | float):
            return [constant(other)] * k if self.dtype == torch.float32 else None
        if not isinstance(other, Lazy | torch.Tensor) or other.dtype != self.dtype or not other.is_cpu:
            return None
        if other.shape == self.shape or (self.dim() == 3 and other.shape == self.shape[1:]):
            rows = Lazy.of(other).steps
        elif self.dim() != 3:
            return None
        elif other.shape == (k, 1, 1):
            rows = tuple(constant(value) for value in other.flatten().tolist())
        elif other.dim() == 3 and len(other) in (1, k) and other.shape[1:] == (1, self.shape[-1]):
            rows = tuple(_columns(row) for row in plain(other).contiguous().view(len(other), -1))
        else:
            return None
        return rows if len(rows) == k else rows * k


def _columns(row: Tensor) -> Step:
    """The same ``row`` [c] over and over."""
    return Step("COLUMNS", told=(row.data_ptr(), len(row)), memory=row)


def stacked(several: Sequence[Any]) -> Lazy:
    """Several [r c] or [k r c] as one [k r c]."""
    each = [Lazy.of(one) for one in several]
    steps = [step for one in each for step in one.steps]
    return Lazy(steps, (len(steps), *each[0].shape[-2:]), mask=each[0].dtype == torch.bool)


def plain(value: Any) -> Any:
    """The same with tensors for expressions."""
    if isinstance(value, Lazy):
        return value.tensor()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return type(value)(map(plain, value)) if type(value) in (tuple, list) else value


def _as_torch_does(name: str) -> Any:
    return lambda self, *others: getattr(self.tensor(), name)(*plain(others))


for _name in ("rtruediv", "neg", "abs", "pow", "matmul", "rmatmul", "eq", "lt", "le", "gt", "ge", "bool"):
    setattr(Lazy, f"__{_name}__", _as_torch_does(f"__{_name}__"))
