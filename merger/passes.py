"""Passes over a tensor's slices: a flow's questions are put to all of them, and every flow goes on with the answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Condition
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.ops import Before, Flow, Max, Question, Size, Sum, Tally

if TYPE_CHECKING:
    from torch import Tensor

Mapper = Callable[[Callable[[int], Any], Iterable[int]], Iterator[Any]]
"""Like ``map``: calls a function on every slice's number, which it takes in order, and gives the results in order."""


@dataclass(frozen=True)
class Sizes:
    """How many elements a share is a share of."""

    tensor: int
    model: int

    def of(self, scope: str) -> int:
        """The elements of the tensor, or of all tensors that are ranked together with it."""
        return self.model if scope == "global" else self.tensor


@dataclass
class _Line:
    """A sum that grows from slice to slice: each waits for those before it, which were taken before it."""

    totals: list[Tensor] = field(default_factory=list)  # before slice i, and at last of all
    broken: bool = False
    moved: Condition = field(default_factory=Condition)

    def before(self, i: int, value: Tensor) -> Tensor:
        """The sum of the values of the slices before ``i``; its own joins it."""
        with self.moved:
            if not self.totals:
                self.totals.append(torch.zeros_like(value))
            self.moved.wait_for(lambda: len(self.totals) > i or self.broken)
            if self.broken:
                raise RuntimeError("an earlier slice failed")  # whose error comes first, and is told
            self.totals.append(self.totals[i] + value)
            self.moved.notify_all()
            return self.totals[i]

    def break_(self) -> None:
        """Lets go whoever waits for a slice that will not come."""
        with self.moved:
            self.broken = True
            self.moved.notify_all()


class _Pass:
    """One visit to every slice of a tensor: what is answered on the way, and what is counted."""

    def __init__(self) -> None:
        self.lines: list[_Line] = []
        self.counters: list[Tensor] = []  # one for each thread that counts at the same time
        self.lock = Condition()

    def line(self, number: int) -> _Line:
        """The sum for this pass's ``number``-th question about the slices before."""
        with self.lock:
            self.lines += [_Line() for _ in range(number + 1 - len(self.lines))]
            return self.lines[number]

    def count(self, question: Tally) -> Tally:
        """Lets a slice add to counters that nobody else adds to just now."""
        try:
            mine = self.counters.pop()
        except IndexError:
            mine = torch.zeros(question.counters, dtype=torch.int64)
        question.add(mine)
        self.counters.append(mine)
        return replace(question, add=_counted)

    def part(self, question: Question) -> Question:
        """The question with this slice's part of the answer, computed side by side; the slice itself is let go."""
        if isinstance(question, Tally):
            return self.count(question)
        return question if isinstance(question, Size) else replace(question, of=question.value)


def _counted(into: Tensor) -> None:
    """Is in the counters of its pass already."""


def run(
    count: int,
    start: Callable[[int], Flow[None]],
    *,
    sizes: Sizes,
    known: Sequence[Any] = (),
    hold: bool = False,
    mapper: Mapper = map,
) -> Question | None:
    """Carries the flows of a tensor's ``count`` slices as far as what is ``known`` of the model allows.

    ``start(i)`` is a flow that reads slice i, merges it and puts the result away. With ``hold``
    unfinished flows stay in memory between questions, else they are started again.
    Returns None when all is done, or the first question about the model that ``known`` does not
    answer, with this tensor's part of it.
    """
    answers: list[Callable[[int], Any]] = []  # in the order in which a flow asks
    held: dict[int, tuple[Flow[None], Question, int]] = {}
    used = 0

    def step(i: int, now: _Pass) -> Question | None:
        try:
            if i in held:
                running, question, given = held.pop(i)
            else:
                running, given = start(i), 0
                question = next(running)
            while True:
                if isinstance(question, Size):
                    question = running.send(sizes.of(question.scope))
                    continue
                if given < len(answers):
                    answer = answers[given](i)
                elif isinstance(question, Before) and question.scope == "tensor":
                    answer = now.line(given - len(answers)).before(i, question.value)
                else:
                    break
                question, given = running.send(answer), given + 1
        except StopIteration:
            return None
        except BaseException:
            for line in now.lines:
                line.break_()
            raise
        if hold:
            held[i] = running, question, given
        return now.part(question)

    while True:
        now = _Pass()
        question, total, before = _joined(mapper(partial(step, now=now), range(count)), now)
        if question is None:
            return None
        outside = None
        if question.scope == "global":
            if used == len(known):
                return replace(question, of=total)
            outside, used = known[used], used + 1
        answers += [line.totals.__getitem__ for line in now.lines]
        answers.append(_answer(question, total, before, outside))


def _joined(questions: Iterable[Question | None], now: _Pass) -> tuple[Sum | Max | Before | None, Any, list[Any]]:
    """One question in all slices' name, its values as one, and for `Before` what is ahead of each slice."""
    asked, total, before = None, None, []
    for question in questions:
        if isinstance(question, Sum | Max | Before):
            asked = question
            if isinstance(question, Before):
                before.append(torch.zeros_like(question.value) if total is None else total)
            total = question.joined(total)
        elif isinstance(question, Tally):
            tally = question
    if now.counters:
        asked = tally.of_all(sum(now.counters[1:], now.counters[0]))
        total = asked.value
    return asked, total, before


def _answer(question: Sum | Max | Before, total: Any, before: list[Any], outside: Any) -> Callable[[int], Any]:
    if isinstance(question, Before):
        return lambda i: before[i] + (0 if outside is None else outside)
    answer = question.answer(total if outside is None else outside)
    return lambda i: answer


def settle(
    groups: Sequence[Hashable],
    visit: Callable[[int, Sequence[Any]], Question | None],
    mapper: Mapper = map,
) -> None:
    """Visits every tensor until none has an open question about all tensors of its group.

    ``visit(i, known)`` is `run` on tensor i. Tensors are visited in order, which for a shared
    ranking is the canonical one: equal scores go to the earlier tensor (methods.md 0.4).
    """
    known: list[list[Any]] = [[] for _ in groups]
    waiting = list(range(len(groups)))
    while waiting:
        totals: dict[Hashable, Any] = {}
        asked: list[int] = []
        for i, question in zip(waiting, mapper(lambda i: visit(i, known[i]), waiting), strict=True):
            if isinstance(question, Sum | Max | Before):
                total = totals.get(groups[i])
                ahead = torch.zeros_like(question.value) if total is None else total
                known[i].append(ahead if isinstance(question, Before) else None)
                totals[groups[i]] = question.joined(total)
                asked.append(i)
        for i in asked:
            if known[i][-1] is None:
                known[i][-1] = totals[groups[i]]
        waiting = asked
