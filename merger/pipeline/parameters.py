"""The kinds of value a recipe may give to a method, as annotations of the method's own arguments.

A number is kept as the exact fraction that was written (0.29 of 100 is 29). Wherever one number
fits, a list of numbers over the model's depth fits too; the plural kinds also take a map by expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    WithJsonSchema,
)

from merger.errors import nearest
from merger.ops.questions import Scope as Scope

LARGEST = 1e30  # what float32 still holds, times a few
_WRITTEN = re.compile(r"[+-]?(\d{1,30}/\d{1,30}|(\d{1,30}\.?\d{0,30}|\.\d{1,30})([eE][+-]?\d{1,2})?)\Z")


def _exact(value: Any) -> Fraction:
    """The number as written: an int, a float's shortest decimal, or text such as '1/3'."""
    if value is None:
        raise ValueError("is empty, expected a number")
    if isinstance(value, bool) or not isinstance(value, int | float | str | Fraction):
        raise ValueError(f"expected a number, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, not {value}")
    if isinstance(value, str) and not _WRITTEN.match(value):
        raise ValueError(f"expected a number or a fraction such as 1/3, not {value[:80]!r}")
    try:
        exact = Fraction(repr(value) if isinstance(value, float) else value)
    except ZeroDivisionError:
        raise ValueError(f"expected a number or a fraction such as 1/3, not {value!r}") from None
    if abs(exact) > LARGEST:
        raise ValueError(f"expected a number of at most {LARGEST:g}, not {str(value)[:80]}")
    return exact


def plain(value: Fraction) -> int | float | str:
    """The number as YAML and JSON write it, without loss."""
    if value.denominator == 1:
        return int(value)
    short = float(value)
    return short if Fraction(repr(short)) == value else str(value)


_NUMBER_SCHEMA = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^-?\d+(/\d+|\.\d+)?$"}]}

Real = Annotated[Fraction, BeforeValidator(_exact), PlainSerializer(plain), WithJsonSchema(_NUMBER_SCHEMA)]
Unit = Annotated[Real, Field(ge=0, le=1)]


WORDS = ("auto", "fit", "mean", "sum")
"""What some parameters take in place of a number."""


def _shape(value: Any) -> str:
    if isinstance(value, Mapping):
        return "by_expert"
    if isinstance(value, list | tuple):
        return "by_depth"
    return value if isinstance(value, str) and value in WORDS else "one"


@dataclass(frozen=True)
class EachExpert:
    """Marks a parameter that is resolved to a list with one value for each expert."""


@dataclass(frozen=True)
class Varying:
    """Marks a parameter that is resolved to one number for the tensor at hand."""


def _word(word: str) -> Any:
    return Annotated[Literal[word], Tag(word)]


def _over_depth(number: Any, *extra: Any) -> Any:
    """One number, or at least two of them interpolated from the first block to the last."""
    numbers = Annotated[list[number], Field(min_length=2)]
    kinds: Any = Annotated[number, Tag("one")] | Annotated[numbers, Tag("by_depth")]
    for kind in extra:
        kinds = kinds | kind
    return Annotated[kinds, Discriminator(_shape)]


def _by_expert(number: Any, *extra: Any) -> Any:
    by_expert: Any = dict.__class_getitem__((str, _over_depth(number)))
    return _over_depth(number, Annotated[by_expert, Tag("by_expert")], *extra)


if TYPE_CHECKING:  # a recipe may write more than a function receives, so checkers see neither
    Number: TypeAlias = Any
    NumberOrAuto: TypeAlias = Any
    Share: TypeAlias = Any
    ShareOrAuto: TypeAlias = Any
    Numbers: TypeAlias = Any
    Shares: TypeAlias = Any
    SharesOrAuto: TypeAlias = Any
    Stretch: TypeAlias = Any
    Towards: TypeAlias = Any
    Order: TypeAlias = Any
else:
    Number = Annotated[_over_depth(Real), Varying()]
    NumberOrAuto = Annotated[_over_depth(Real, _word("auto")), Varying()]
    Share = Annotated[_over_depth(Unit), Varying()]
    ShareOrAuto = Annotated[_over_depth(Unit, _word("auto")), Varying()]
    Numbers = Annotated[_by_expert(Real), EachExpert()]
    Shares = Annotated[_by_expert(Unit), EachExpert()]
    SharesOrAuto = Annotated[_by_expert(Unit, _word("auto")), EachExpert()]
    Stretch = Annotated[_over_depth(Real, _word("fit")), Varying()]
    Towards = Annotated[_over_depth(Real, _word("mean"), _word("sum"), _word("fit")), Varying()]


class Pinned(BaseModel):
    """An order of experts with one of them pinned; the rest rotates with the depth, or stays as listed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    first: str | None = None
    last: str | None = None
    rest: Literal["rotate", "listed"] = "rotate"
    unit: Literal["block", "linear"] = "block"


def _order_shape(value: Any) -> str:
    if isinstance(value, Mapping | Pinned):
        return "pinned"
    return "listed" if isinstance(value, list | tuple) else "named"


if not TYPE_CHECKING:
    Order = Annotated[
        Annotated[Literal["rotation", "listed"], Tag("named")]
        | Annotated[list[str], Tag("listed")]
        | Annotated[Pinned, Tag("pinned")],
        Discriminator(_order_shape),
    ]
"""`rotation`, `listed` (as in the recipe), a list of names, or {first|last: name, rest:, unit:}."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in the model: all that a parameter may depend on."""

    experts: tuple[str, ...]
    weights: tuple[Fraction, ...] = ()  # each expert's own weight; none means 1
    depth: Fraction = Fraction(0)  # 0 at the first block and before it, 1 at the last and after it
    block: int = 0  # rotation index: 0 before the blocks, b + 1 for block b, L + 1 after them
    linear: int = 0  # how many linear layers come before it in the forward pass; a plan counts them up to a full turn


def resolve(annotation: Any, value: Any, place: Place) -> Any:
    """A validated parameter's value for one tensor: a list by expert, one number, or an order's indices."""
    marks = [type(mark) for mark in getattr(annotation, "__metadata__", ())]
    if EachExpert in marks:
        by_name = value if isinstance(value, Mapping) else dict.fromkeys(place.experts, value)
        _same_names(by_name, place.experts, complete=True)
        return [at_depth(by_name[name], place.depth) for name in place.experts]
    if Varying in marks:
        return value if value in WORDS else at_depth(value, place.depth)
    if is_order(annotation) and value is not None:
        return order_of(value, place)
    return value


def check_names(annotation: Any, value: Any, experts: Sequence[str]) -> None:
    """Raises ValueError for a parameter that names an unknown expert or omits one.

    The value need not be validated: of one that is neither a map by expert nor a list of experts, nothing is said.
    """
    is_by_expert = any(isinstance(mark, EachExpert) for mark in getattr(annotation, "__metadata__", ()))
    names_experts = (is_by_expert and isinstance(value, Mapping)) or (is_order(annotation) and isinstance(value, list))
    if names_experts and all(isinstance(name, str) for name in value):
        _same_names(value, experts, complete=True)


def _same_names(names: Iterable[str], experts: Sequence[str], *, complete: bool) -> None:
    for name in names:
        if name not in experts:
            raise ValueError(f"there is no expert {name!r}; {nearest(name, experts)}")
    missing_names = [name for name in experts if name not in names]
    if complete and missing_names:
        raise ValueError(f"has no value for {', '.join(missing_names)}")


def is_order(annotation: Any) -> bool:
    """Whether a parameter is an order of experts, or none."""
    return annotation == Order or Order in getattr(annotation, "__args__", ())


def turns(value: Any) -> bool:
    """Whether a parameter's value is an order that differs from block to block."""
    return value == "rotation" or (isinstance(value, Pinned) and value.rest == "rotate")


def at_depth(value: Any, depth: Fraction) -> Fraction:
    """A number, or the exact linear interpolation of a list at ``depth``."""
    if not isinstance(value, list):
        return _exact(value)
    position = depth * (len(value) - 1)
    low = min(int(position), len(value) - 2)
    return Fraction(value[low] + (value[low + 1] - value[low]) * (position - low))


def order_of(value: Any, place: Place) -> tuple[int, ...]:
    """The experts' indices in merging order for one tensor (docs/methods/obim.md)."""
    names = list(place.experts)
    if isinstance(value, list):
        _same_names(value, names, complete=True)
        if len(set(value)) < len(value):
            raise ValueError(f"expected each expert once, found {', '.join(value)}")
        return tuple(names.index(name) for name in value)
    if value == "listed":
        return tuple(range(len(names)))
    pin = Pinned() if value == "rotation" else value
    pinned = [name for name in (pin.first, pin.last) if name is not None]
    _same_names(pinned, names, complete=False)
    if len(set(pinned)) < len(pinned):
        raise ValueError(f"{pin.first} cannot be both first and last")
    movable = [name for name in names if name not in pinned]
    if pin.rest == "rotate" and movable:
        turn = (place.block if pin.unit == "block" else place.linear) % len(movable)
        movable = movable[turn:] + movable[:turn]
    first = [pin.first] if pin.first is not None else []
    last = [pin.last] if pin.last is not None else []
    return tuple(names.index(name) for name in first + movable + last)
