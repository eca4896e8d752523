"""Passes over a tensor's slices: a flow's questions are put to all of them, and every flow goes on with the answer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from threading import Condition, Lock
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.ops.questions import Before, Flow, Found, Guess, Max, Question, Size, Sum, Tally

if TYPE_CHECKING:
    from torch import Tensor

Mapper = Callable[[Callable[[int], Any], Iterable[int]], Iterator[Any]]
"""Like ``map``: calls a function on every slice's number, which it takes in order, and gives the results in order."""

Ahead = dict[int, "Tensor"]
"""What the tensors before this one have of each sum over what comes before, by the question's place in the flow."""

_OPEN = object()


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

    scope: str
    totals: list[Any] = field(default_factory=list)  # before slice i, and at last of all; see `before`
    failed: float = math.inf  # the first slice that failed: later ones wait in vain, earlier ones do not
    moved: Condition = field(default_factory=Condition)

    def before(self, i: int, question: Before) -> Tensor:
        """The sum of the counts of the slices before ``i``; its own joins it.

        They are kept as Python's numbers: a small tensor that stays between large ones that go keeps the allocator
        from joining what they leave (measured: a megabyte for every slice).
        """
        with self.moved:
            if len(self.totals) > i + 1:
                return torch.tensor(self.totals[i])  # the flow was started again
        value = question.value
        with self.moved:
            if not self.totals:
                self.totals.append(torch.zeros_like(value).tolist())
            self.moved.wait_for(lambda: len(self.totals) > i or i > self.failed)
            if len(self.totals) <= i:
                raise RuntimeError("an earlier slice failed")  # whose error comes first, and is told
            before = torch.tensor(self.totals[i])
            self.totals.append((before + value.cpu()).tolist())
            self.moved.notify_all()
            return before

    def break_at(self, i: int) -> None:
        """Lets go whoever waits for slice ``i``, which will not come."""
        with self.moved:
            self.failed = min(self.failed, i)
            self.moved.notify_all()


@dataclass
class _Visit:
    """One tensor's flows, and all that was answered to them; a question is known by its place in the flow."""

    start: Callable[[int], Flow[None]]
    sizes: Sizes
    known: Sequence[Any]
    ahead: Ahead
    hold: bool
    rehearse: Callable[[], Sequence[Any]] = tuple  # what was found of a sample after each guess, in their order
    held: dict[int, tuple[Flow[None], Question, int]] = field(default_factory=dict)
    answers: dict[int, Any] = field(default_factory=dict)
    of_the_model: list[int] = field(default_factory=list)  # places of the questions that `known` answers
    lines: dict[int, _Line] = field(default_factory=dict)
    guesses: list[int] = field(default_factory=list)  # places of the questions that guesses are about
    counters: list[Tensor] = field(default_factory=list)  # one for each thread that counts at the same time
    failed: float = math.inf
    lock: Lock = field(default_factory=Lock)
    guessing: Lock = field(default_factory=Lock)

    def step(self, i: int) -> Question | None:
        """Carries slice ``i`` to its end, or to a question that no pass has answered yet: with its part of it."""
        try:
            if i in self.held:
                running, question, place = self.held.pop(i)
            else:
                running, place = self.start(i), 0
                question = next(running)
            while (answer := self._answer(i, question, place)) is not _OPEN:
                place += not isinstance(question, Size | Guess | Found)
                question = running.send(answer)
        except StopIteration:
            return None
        except BaseException:
            with self.lock:
                self.failed = min(self.failed, i)
                for line in self.lines.values():
                    line.break_at(i)
            raise
        if self.hold:
            self.held[i] = running, question, place
        return self._part(question)

    def _answer(self, i: int, question: Question, place: int) -> Any:
        if isinstance(question, Size):
            return self.sizes.of(question.scope)
        if isinstance(question, Found):
            return None
        if isinstance(question, Guess):
            return self._guess(place) if question.scope == "tensor" else None
        if isinstance(question, Before):
            with self.lock:
                line = self.lines.setdefault(place, _Line(question.scope, failed=self.failed))
            before = line.before(i, question)
            return before + self.ahead[place] if question.scope == "global" and place in self.ahead else before
        if place not in self.answers and question.scope == "global":
            with self.lock:
                self.of_the_model += [] if place in self.of_the_model else [place]
                number = self.of_the_model.index(place)
                if number < len(self.known):
                    self.answers[place] = question.answer(self.known[number])
        return self.answers.get(place, _OPEN)

    def _guess(self, place: int) -> Any:
        with self.guessing:
            self.guesses += [] if place in self.guesses else [place]
            number = self.guesses.index(place)
            return (self.rehearsed[number] or None) if number < len(self.rehearsed) else None

    @cached_property
    def rehearsed(self) -> Sequence[Any]:
        """What was found of a sample after each guess."""
        return self.rehearse()

    def _part(self, question: Question) -> Question:
        """The question with this slice's part of the answer, computed side by side; the slice itself is let go.

        Slices may be on several devices, so their parts meet on the CPU.
        """
        if not isinstance(question, Tally):
            return (
                question if isinstance(question, Size | Guess | Found) else replace(question, of=question.value.cpu())
            )
        try:
            mine = self.counters.pop()
        except IndexError:
            mine = torch.zeros(question.counters, dtype=torch.int64)
        question.add(mine)
        self.counters.append(mine)
        return replace(question, add=_counted)

    def joined(self, asked: Question | None, total: Tensor | None) -> Sum | Max | None:
        """The open question, if there is one, with what all slices together have of the answer."""
        if isinstance(asked, Tally):
            total = reduce(torch.add, self.counters)
            asked = asked.of_all(total)
            self.counters.clear()
        return replace(asked, of=total) if isinstance(asked, Sum | Max) and total is not None else None

    def tell(self, question: Sum | Max) -> None:
        """Answers the open question."""
        self.answers[len(self.answers) + len(self.lines)] = question.answer(question.value)

    def pass_on(self) -> None:
        """Adds what this tensor has of the model's sums over what comes before to what is ahead of the next."""
        for place, line in self.lines.items():
            if line.scope == "global":
                self.ahead[place] = torch.tensor(line.totals[-1]) + self.ahead.get(place, 0)


@dataclass
class _Rehearsal(_Visit):
    """A sample's flow, which finds what later ones guess."""

    found: list[list[Any]] = field(default_factory=list)  # after each guess at a tensor

    def _answer(self, i: int, question: Question, place: int) -> Any:
        if isinstance(question, Guess):
            self.found += [[]] if question.scope == "tensor" else []
            return None
        if isinstance(question, Found) and self.found:
            self.found[-1] += question.values
        return super()._answer(i, question, place)


def _joined(part: Question | None, total: Tensor | None) -> Tensor | None:
    """The answer to an open question so far, together with the part of one more slice."""
    return part.joined(total) if isinstance(part, Sum | Max) else total


def _counted(into: Tensor) -> None:
    """Is in the counters of its pass already."""


def run(
    count: int,
    start: Callable[[int], Flow[None]],
    *,
    sizes: Sizes,
    known: Sequence[Any] = (),
    ahead: Ahead | None = None,
    hold: bool = False,
    mapper: Mapper = map,
    rehearse: Callable[[], Sequence[Any]] = tuple,
) -> Sum | Max | None:
    """Carries the flows of a tensor's ``count`` slices as far as what is ``known`` of the model allows.

    ``start(i)`` is a flow that reads slice i, merges it and puts the result away. With ``hold``
    unfinished flows stay in memory between questions, else they are started again. ``rehearse`` is
    asked for guesses when a flow asks for one, and says what `rehearsal` said of a sample.
    Returns None when all is done, or the first question about the model that ``known`` does not
    answer, with this tensor's part of it.
    """
    visit = _Visit(start, sizes, known, {} if ahead is None else ahead, hold, rehearse)
    while True:
        part, total = None, None
        for part in mapper(visit.step, range(count)):
            total = _joined(part, total)
        question = visit.joined(part, total)
        if question is None or question.scope == "global":
            visit.pass_on()
            return question
        visit.tell(question)


def rehearsal(start: Callable[[], Flow[Any]], size: int) -> list[Any]:
    """What a flow over a sample of ``size`` elements finds after each guess that it asks for.

    As if the sample were the whole tensor, up to a question about the whole model.
    """
    visit = _Rehearsal(lambda _: start(), Sizes(size, size), (), {}, hold=True)
    while True:
        part = visit.step(0)
        question = visit.joined(part, _joined(part, None))
        if question is None or question.scope == "global":
            return visit.found
        visit.tell(question)


class Ranking:
    """The passes over tensors of which those of a group are ranked together, until no tensor has an open question.

    It iterates over the numbers of the tensors to visit, pass after pass, in order. For a shared ranking that is the
    canonical order, so that equal scores go to the earlier tensor. A visit is `run` with the tensor's `answers` and
    `ahead`; `record` takes the question that it ends with.
    """

    def __init__(self, groups: Sequence[Hashable]) -> None:
        self._groups = groups
        self._answers: dict[Hashable, list[Any]] = defaultdict(list)
        self._ahead: dict[Hashable, Ahead] = defaultdict(dict)
        self._totals: dict[Hashable, Any] = {}
        self._open: list[int] = []

    def __iter__(self) -> Iterator[int]:
        waiting = list(range(len(self._groups)))
        while waiting:
            yield from waiting
            for group, total in self._totals.items():
                self._answers[group].append(total)
            waiting, self._open = self._open, []
            self._totals.clear()
            self._ahead.clear()

    def answers(self, i: int) -> Sequence[Any]:
        """What earlier passes have answered about all tensors of the group of tensor ``i``."""
        return self._answers[self._groups[i]]

    def ahead(self, i: int) -> Ahead:
        """The sums over the tensors of its group that this pass has visited before tensor ``i``."""
        return self._ahead[self._groups[i]]

    def record(self, i: int, question: Sum | Max | None) -> None:
        """Joins the open question of tensor ``i`` to those of its group; None where the tensor is finished."""
        if question is not None:
            group = self._groups[i]
            self._totals[group] = question.joined(self._totals.get(group))
            self._open.append(i)


def settle(groups: Sequence[Hashable], visit: Callable[[int, Sequence[Any], Ahead], Sum | Max | None]) -> None:
    """Visits tensors by ``visit(i, answers, ahead)`` until none has an open question, as `Ranking` says."""
    ranking = Ranking(groups)
    for i in ranking:
        ranking.record(i, visit(i, ranking.answers(i), ranking.ahead(i)))
