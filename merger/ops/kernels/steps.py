"""The steps of an expression over a slice, and the tape by which pieces.c computes them together, a piece at a time."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from merger._lazy import torch
from merger.ops.kernels.library import call, step_numbers

if TYPE_CHECKING:
    from torch import Tensor

NOT_FINITE, OVERFLOW, NO_MEMORY = 1, 2, 4


class InPlaceError(TypeError):
    """A method changes an array in place that expressions read."""


class Step:
    """One operation on a row of a slice: its operands, and the numbers that belong to it."""

    __slots__ = ("dtype", "memory", "name", "numbers", "of", "refuse", "version")

    def __init__(
        self,
        name: str,
        *of: Step,
        numbers: Sequence[int] = (),
        dtype: int = 0,
        memory: Tensor | None = None,
        refuse: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.of = of
        self.numbers = numbers  # at most three: addresses, or the bits of a float
        self.dtype = dtype
        self.memory = memory  # must live as long as the step
        self.version = 0 if memory is None else memory._version  # torch counts changes in place, views included
        self.refuse = refuse  # called when stored values are not finite

    def is_in(self, memory: Tensor) -> None:
        """Replaces the operation by a load of the row from ``memory`` [n]."""
        name = "LOAD_MASK" if memory.dtype == torch.bool else "LOAD"
        self.name, self.of, self.numbers, self.memory = name, (), (memory.data_ptr(),), memory
        self.version = memory._version

    def check_unchanged(self) -> None:
        """Raises InPlaceError if the memory that the step reads was changed since the step was made."""
        if self.memory is not None and self.memory._version != self.version:
            raise InPlaceError(
                "an array that an expression reads was changed in place; assign the result to a new name instead, "
                "as in `deltas = deltas * 10`"
            )


def constant(value: float) -> Step:
    """A number in every place, as torch rounds it to float32."""
    (bits,) = array("I", array("f", [value]).tobytes())
    return constant_bits(bits)


@lru_cache(256)
def constant_bits(bits: int) -> Step:
    """One step for the same bits, so that they take one register."""
    return Step("CONSTANT", numbers=(bits,))


def carry_out(sinks: Iterable[Step], size: int) -> int:
    """Computes ``sinks`` and all steps that they depend on, over ``size`` elements.

    Returns a bit mask of errors that the caller handles: OVERFLOW. Raises MemoryError, InPlaceError, or CheckpointError
    naming the input that holds NaN or infinity.
    """
    order = _in_order(sinks)
    for step in order:
        step.check_unchanged()
    tape, registers = _tape(order)
    tables = sum(step.name == "TALLY_HIGH" for step in order)
    errors = call("take_steps", tape.buffer_info()[0], len(order), registers, tables, size)
    if errors & NO_MEMORY:
        raise MemoryError
    if errors & NOT_FINITE:
        for step in order:
            if step.refuse is not None:
                step.refuse()
    return errors


def _in_order(sinks: Iterable[Step]) -> list[Step]:
    """Every step once, after its operands."""
    order: dict[Step, None] = {}
    waiting = list(sinks)
    while waiting:
        step = waiting[-1]
        missing = [source for source in step.of if source not in order]
        if missing and step not in order:
            waiting += reversed(missing)
        else:
            order.setdefault(waiting.pop())
    return list(order)


def _tape(order: Sequence[Step]) -> tuple[array[int], int]:
    """The steps as pieces.c reads them, and the number of registers; a register is free again after its last use."""
    codes, last = step_numbers(), {source: step for step in order for source in step.of}
    places: dict[Step, int] = {}
    free: list[int] = []
    tape, count, tables = array("Q"), 0, 0
    for step in order:
        if step not in last:  # a sink
            places[step] = 0
        elif step.name == "TAKE":  # in place
            places[step] = places[step.of[2]]
        elif free and step.name != "CONSTANT":  # which is written once, for all pieces
            places[step] = free.pop()
        else:
            count += 1
            places[step] = count
        used = [places[source] for source in step.of]
        tally = step.name == "TALLY_HIGH"
        number = tables if tally else step.dtype
        tables += tally
        tape.extend((codes[step.name], places[step], *used, *_NOTHING[len(used) :]))
        tape.extend((*step.numbers, *_NOTHING[len(step.numbers) :], number))
        dead = dict.fromkeys(source for source in step.of if last[source] is step and source.name != "CONSTANT")
        free += [places[source] for source in dead if places[source] != places[step]]
    return tape, count


_NOTHING = (0, 0, 0)
