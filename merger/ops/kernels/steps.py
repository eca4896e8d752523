"""Steps of an expression over slices, and how pieces.c is told to take them: in one go, a piece at a time."""

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


class Step:
    """One operation on a row of a slice: what it is made of, and what it is told beside."""

    __slots__ = ("memory", "name", "of", "refuse", "told", "which")

    def __init__(
        self,
        name: str,
        *of: Step,
        told: Sequence[int] = (),
        which: int = 0,
        memory: Tensor | None = None,
        refuse: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.of = of
        self.told = told  # up to three numbers: addresses, bits of a float
        self.which = which
        self.memory = memory  # must live as long as the step
        self.refuse = refuse  # called when stored values are not finite

    def is_in(self, memory: Tensor) -> None:
        """From now on the row is loaded from ``memory`` [n]."""
        name = "LOAD_MASK" if memory.dtype == torch.bool else "LOAD"
        self.name, self.of, self.told, self.memory = name, (), (memory.data_ptr(),), memory


def constant(value: float) -> Step:
    """A number in every place, as torch rounds it to float32."""
    (bits,) = array("I", array("f", [value]).tobytes())
    return constant_bits(bits)


@lru_cache(256)
def constant_bits(bits: int) -> Step:
    """The same step for the same bits, so that these take one register."""
    return Step("CONSTANT", told=(bits,))


def carry_out(sinks: Iterable[Step], size: int) -> int:
    """Takes all steps that lead to ``sinks`` over ``size`` elements. What went wrong, but for what is raised.

    Raises MemoryError, and what the ``refuse`` of a step raises whose stored values are not finite.
    """
    order = _in_order(sinks)
    tape, registers = _tape(order)
    tables = sum(step.name == "TALLY_HIGH" for step in order)
    wrong = call("take_steps", tape.buffer_info()[0], len(order), registers, tables, size)
    if wrong & NO_MEMORY:
        raise MemoryError
    if wrong & NOT_FINITE:
        for step in order:
            if step.refuse is not None:
                step.refuse()
    return wrong


def _in_order(sinks: Iterable[Step]) -> list[Step]:
    """Every step once, after those that it is made of."""
    order: dict[Step, None] = {}
    waiting = list(sinks)
    while waiting:
        step = waiting[-1]
        missing = [each for each in step.of if each not in order]
        if missing and step not in order:
            waiting += reversed(missing)
        else:
            order.setdefault(waiting.pop())
    return list(order)


def _tape(order: Sequence[Step]) -> tuple[array[int], int]:
    """The steps as pieces.c takes them, and how many registers they need; one is free again after its last use."""
    numbers, last = step_numbers(), {each: step for step in order for each in step.of}
    places: dict[Step, int] = {}
    free: list[int] = []
    tape, count, tables = array("Q"), 0, 0
    for step in order:
        if step not in last:  # nobody's, so a sink
            places[step] = 0
        elif step.name == "TAKE":  # in place
            places[step] = places[step.of[2]]
        elif free and step.name != "CONSTANT":  # which is written once, for all pieces
            places[step] = free.pop()
        else:
            count += 1
            places[step] = count
        used = [places[each] for each in step.of]
        tally = step.name == "TALLY_HIGH"
        which = tables if tally else step.which
        tables += tally
        tape.extend((numbers[step.name], places[step], *used, *_NOTHING[len(used) :]))
        tape.extend((*step.told, *_NOTHING[len(step.told) :], which))
        done = dict.fromkeys(each for each in step.of if last[each] is step and each.name != "CONSTANT")
        free += [places[each] for each in done if places[each] != places[step]]
    return tape, count


_NOTHING = (0, 0, 0)
