"""Passes over the slices of a tensor: each slice's flow runs until it asks a question that all slices must answer.

One pass collects every slice's part of the open question; the next pass goes on with the answer.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from threading import Condition, Lock
from typing import TYPE_CHECKING, Any, cast

from merger._lazy import torch
from merger.ops.questions import UNANSWERED, Flow, Key, PrefixSum, Question, Total, Whole

if TYPE_CHECKING:
    from torch import Tensor

Mapper = Callable[[Callable[[int], Any], Iterable[int]], Iterator[Any]]
"""Like ``map``: calls a function for every slice number, in order, and yields the results in order."""
ModelTotals = Mapping[Key, "Tensor"]
"""The totals over all tensors that are ranked together, of the questions that are answered so far."""
EarlierSums = dict[Key, "Tensor"]
"""The prefix sums over all tensors before this one, by question."""
SampleNotes = Mapping[int, Sequence[Any]]
"""The notes that a flow over a sample of the tensor made, by number."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of elements that a density is a share of."""

    tensor: int
    model: int


@dataclass(frozen=True)
class OpenTotal:
    """A question that flows wait with, and the total of the parts that were collected so far."""

    key: Key
    question: Total
    total: Tensor

    def joined(self, addition: OpenTotal) -> OpenTotal:
        """Returns the total together with a later part of it."""
        assert self.key == addition.key, f"flows of one pipeline ask {self.key} and {addition.key}"
        return OpenTotal(self.key, self.question, self.question.join(self.total, addition.total))


class SliceFlow:
    """The flow of one slice, stopped at a question."""

    def __init__(self, flow: Flow[None]) -> None:
        self._flow = flow
        self._asked = Counter[tuple[Whole, str]]()
        self._stop_at(next(flow))

    def resume(self, answer: Any) -> None:
        """Gives the answer and runs to the next question; raises StopIteration at the end of the flow."""
        self._stop_at(self._flow.send(answer))

    def _stop_at(self, question: Question) -> None:
        name = question.scope, question.name
        self.question = question
        self.key: Key = (*name, self._asked[name])
        self._asked[name] += 1


@dataclass
class RunningSum:
    """A sum over the slices in their order: slice i waits for those before it, which threads took before it."""

    sums: list[Any] = field(default_factory=list)  # entry i is the sum over the slices before i
    failed: float = math.inf  # the first slice that failed; later ones must not wait for it
    changed: Condition = field(default_factory=Condition)

    def before(self, i: int, counts: Callable[[], Tensor]) -> Tensor:
        """Returns the sum over the slices before ``i``, after adding the counts of slice ``i``.

        Sums are kept as Python numbers: a small tensor that stays between large ones that are freed keeps the
        allocator from joining their memory (measured: a megabyte for every slice).
        """
        with self.changed:
            if len(self.sums) > i + 1:
                return torch.tensor(self.sums[i])  # the flow was started again
        value = counts()
        with self.changed:
            if not self.sums:
                self.sums.append(torch.zeros_like(value).tolist())
            self.changed.wait_for(lambda: len(self.sums) > i or i > self.failed)
            if len(self.sums) <= i:
                raise RuntimeError("an earlier slice failed")  # whose own error is raised first
            before = torch.tensor(self.sums[i])
            self.sums.append((before + value.cpu()).tolist())
            self.changed.notify_all()
            return before

    def fail(self, i: int) -> None:
        """Releases the slices that wait for slice ``i``."""
        with self.changed:
            self.failed = min(self.failed, i)
            self.changed.notify_all()


@dataclass
class TensorPasses:
    """The flows of one tensor's slices and the answers to their questions."""

    start: Callable[[int], Flow[None]]
    sizes: Sizes
    model_totals: ModelTotals
    earlier_sums: EarlierSums
    hold: bool
    rehearse: Callable[[], SampleNotes] = dict
    notes: dict[int, Sequence[Any]] = field(default_factory=dict)
    paused: dict[int, SliceFlow] = field(default_factory=dict)
    answers: dict[Key, Any] = field(default_factory=dict)
    running_sums: dict[Key, RunningSum] = field(default_factory=dict)
    counters: list[Tensor] = field(default_factory=list)  # one for each thread that counts at the same time
    failed: float = math.inf
    lock: Lock = field(default_factory=Lock)
    sample_lock: Lock = field(default_factory=Lock)
    _sample_notes: SampleNotes | None = None

    def run(self, count: int, mapper: Mapper) -> OpenTotal | None:
        """Passes over the slices until their flows end, or wait with a question about the whole model."""
        while (open_total := self._collect(mapper(self._carry, range(count)))) is not None:
            if open_total.key[0] == "global":
                break
            self.answers[open_total.key] = open_total.question.answer(open_total.total)
        for key, running in self.running_sums.items():
            if key[0] == "global":
                self.earlier_sums[key] = torch.tensor(running.sums[-1]) + self.earlier_sums.get(key, 0)
        return open_total

    def _carry(self, i: int) -> tuple[Key, Total, Tensor | None] | None:
        """Carries slice ``i`` to its end, or to a question that needs a pass; returns its part of that question."""
        try:
            flow = self.paused.pop(i, None) or SliceFlow(self.start(i))
            while (answer := flow.question.reply(self, flow.key, i)) is not UNANSWERED:
                flow.resume(answer)
        except StopIteration:
            return None
        except BaseException:
            self._fail(i)
            raise
        if self.hold:
            self.paused[i] = flow
        question = cast("Total", flow.question)  # no other is left unanswered
        return flow.key, question, question.part(self.counters)

    def _collect(self, parts: Iterable[tuple[Key, Total, Tensor | None] | None]) -> OpenTotal | None:
        """Joins the parts of all slices in their order; None when all flows have ended."""
        open_total: OpenTotal | None = None
        tally: tuple[Key, Total] | None = None
        for contribution in parts:
            if contribution is None:
                continue
            key, question, part = contribution
            if part is None:
                tally = key, question
            else:
                share = OpenTotal(key, question, part)
                open_total = share if open_total is None else open_total.joined(share)
        if tally is not None:
            open_total = OpenTotal(*tally, reduce(torch.add, self.counters))
            self.counters.clear()
        return open_total

    def _fail(self, i: int) -> None:
        with self.lock:
            self.failed = min(self.failed, i)
            for running in self.running_sums.values():
                running.fail(i)

    # --- answers ---

    def size(self, scope: Whole) -> int:
        """See `Answers`."""
        return self.sizes.model if scope == "global" else self.sizes.tensor

    def total(self, key: Key, question: Total) -> Any:
        """See `Answers`."""
        with self.lock:
            if key not in self.answers and key in self.model_totals:
                self.answers[key] = question.answer(self.model_totals[key])
            return self.answers.get(key, UNANSWERED)

    def prefix_sum(self, key: Key, i: int, question: PrefixSum) -> Tensor:
        """See `Answers`."""
        with self.lock:
            running = self.running_sums.setdefault(key, RunningSum(failed=self.failed))
        before = running.before(i, question.counts)
        return before + self.earlier_sums[key] if key in self.earlier_sums else before

    def sample_note(self, number: int) -> Sequence[Any] | None:
        """See `Answers`."""
        with self.sample_lock:
            if self._sample_notes is None:
                self._sample_notes = self.rehearse()
            return self._sample_notes.get(number)

    def note(self, number: int, values: Sequence[Any]) -> None:
        """See `Answers`."""
        self.notes[number] = values


def run_slices(
    count: int,
    start: Callable[[int], Flow[None]],
    *,
    sizes: Sizes,
    model_totals: ModelTotals | None = None,
    earlier_sums: EarlierSums | None = None,
    hold: bool = False,
    mapper: Mapper = map,
    rehearse: Callable[[], SampleNotes] = dict,
) -> OpenTotal | None:
    """Carries the flows of a tensor's ``count`` slices as far as the totals over the model allow.

    ``start(i)`` is a flow that reads slice i, merges it and writes the result. With ``hold`` the flows stay in memory
    between passes, otherwise they are started again. ``rehearse`` runs a flow over a sample of the tensor if a question
    wants its notes. Returns None at the end, or the first question about the whole model that ``model_totals`` does
    not answer.
    """
    passes = TensorPasses(
        start,
        sizes,
        {} if model_totals is None else model_totals,
        {} if earlier_sums is None else earlier_sums,
        hold,
        rehearse,
    )
    return passes.run(count, mapper)


def rehearse(start: Callable[[], Flow[Any]], size: int) -> SampleNotes:
    """Runs a flow over a sample of ``size`` elements as if the sample were the tensor; returns the flow's notes.

    It stops at the first question about the whole model.
    """
    passes = TensorPasses(lambda _: start(), Sizes(size, size), {}, {}, hold=True)
    passes.run(1, map)
    return passes.notes


def run_tensors(groups: Sequence[Hashable], visit: Callable[[int, ModelTotals, EarlierSums], OpenTotal | None]) -> None:
    """Visits every tensor until none waits with a question about all tensors of its group.

    ``visit(i, model_totals, earlier_sums)`` is `run_slices` on tensor i. Tensors are visited in order, so that equal
    scores of a ranking over the whole model go to the earlier tensor.
    """
    model_totals: dict[Hashable, dict[Key, Tensor]] = defaultdict(dict)
    waiting: Sequence[int] = range(len(groups))
    while waiting:
        earlier_sums: dict[Hashable, EarlierSums] = defaultdict(dict)
        open_totals: dict[Hashable, OpenTotal] = {}
        unfinished = []
        for i in waiting:
            group = groups[i]
            open_total = visit(i, model_totals[group], earlier_sums[group])
            if open_total is not None:
                unfinished.append(i)
                open_totals[group] = open_totals[group].joined(open_total) if group in open_totals else open_total
        for group, open_total in open_totals.items():
            model_totals[group][open_total.key] = open_total.total
        waiting = unfinished
