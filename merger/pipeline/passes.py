"""Passes over the slices of a tensor, and over the tensors of a model, to answer the questions of stages.

In a pass the flow of each slice runs until it asks for a total over all slices. The pass adds up their parts of the
total, and the next pass resumes the flows with the answer. A total over the model takes a pass over all its tensors.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
SampleHints = Mapping[int, Sequence[object]]
"""Values that a flow over a sample of the tensor noted, by number: hints for the flows over its slices."""


_NOT_RANKED = (
    'it asks about the whole model, so it needs a parameter `scope: Whole = "global"`, and asks with `scope`; '
    "see docs/adding-a-method.md"
)


@dataclass(frozen=True)
class Sizes:
    """The numbers of elements that a density is a share of."""

    tensor: int
    model: int | None  # None where the tensor is ranked by itself, so that nothing answers for the model


@dataclass(frozen=True)
class OpenTotal:
    """A question that flows wait with, and the sum of the parts that were collected so far."""

    key: Key
    question: Total[Any]
    part: Any  # None while it is in the counters of the threads

    @property
    def total(self) -> Any:
        """The sum of the parts of all slices."""
        assert self.part is not None, "the counters are not added up yet"
        return self.part

    def joined(self, addition: OpenTotal) -> OpenTotal:
        """Returns it together with the part of later slices."""
        assert self.key == addition.key, f"flows of one pipeline ask {self.key} and {addition.key}"
        if self.part is None or addition.part is None:
            return self
        return replace(self, part=self.question.join(self.part, addition.part))


def _joined(total: OpenTotal | None, addition: OpenTotal | None) -> OpenTotal | None:
    """Returns the open totals of two runs of slices together; a flow that has ended has none."""
    if total is None or addition is None:
        return addition if total is None else total
    return total.joined(addition)


class PausedFlow:
    """The flow of one slice, and the question that it waits with."""

    def __init__(self, steps: Flow[None]) -> None:
        self.steps = steps
        self._question_counts = Counter[tuple[Whole, str]]()

    def wait_with(self, question: Question) -> None:
        """Remembers the question that the flow asks now, and names it by how often it was asked before."""
        name = question.scope, question.name
        self.question = question
        self.key: Key = (*name, self._question_counts[name])
        self._question_counts[name] += 1


@dataclass
class RunningSum:
    """A sum over the slices in their order: slice i waits for those before it, which threads took before it."""

    sums: list[Any] = field(default_factory=list)  # entry i is the sum over the slices before i
    failed: float = math.inf  # the first slice that failed; later ones must not wait for it
    changed: Condition = field(default_factory=Condition)

    def sum_before(self, i: int, counts: Callable[[], Tensor]) -> Tensor:
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
            prefix = torch.tensor(self.sums[i])
            self.sums.append((prefix + value.cpu()).tolist())
            self.changed.notify_all()
            return prefix

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
    rehearse: Callable[[], SampleHints] = dict
    notes: dict[int, Sequence[object]] = field(default_factory=dict)
    paused: dict[int, PausedFlow] = field(default_factory=dict)
    answers: dict[Key, object] = field(default_factory=dict)
    running_sums: dict[Key, RunningSum] = field(default_factory=dict)
    counters: list[Tensor] = field(default_factory=list)  # one for each thread that counts at the same time
    failed: float = math.inf
    lock: Lock = field(default_factory=Lock)
    sample_lock: Lock = field(default_factory=Lock)
    _sample_hints: SampleHints | None = None

    def run(self, count: int, mapper: Mapper) -> OpenTotal | None:
        """Passes over the slices until their flows end, or wait with a question about the whole model."""
        while True:
            open_total = reduce(_joined, mapper(self._carry, range(count)), None)
            if self.counters and open_total is not None:
                open_total = replace(open_total, part=reduce(torch.add, self.counters))
                self.counters.clear()
            if open_total is None or open_total.key[0] == "global":
                break
            self.answers[open_total.key] = open_total.question.answer(open_total.total)
        for key, running in self.running_sums.items():
            if key[0] == "global":
                self.earlier_sums[key] = torch.tensor(running.sums[-1]) + self.earlier_sums.get(key, 0)
        return open_total

    def _carry(self, i: int) -> OpenTotal | None:
        """Carries slice ``i`` to its end, or to a question that needs a pass; returns its part of that question."""
        try:
            flow = self.paused.pop(i, None)
            if flow is None:
                flow = PausedFlow(self.start(i))
                flow.wait_with(next(flow.steps))
            while (answer := self._reply(flow, i)) is not UNANSWERED:
                flow.wait_with(flow.steps.send(answer))
        except StopIteration:
            return None
        except BaseException:
            self._fail(i)
            raise
        if self.hold:
            self.paused[i] = flow
        question = cast("Total[Any]", flow.question)  # no other is left unanswered
        return OpenTotal(flow.key, question, question.part(self.counters))

    def _reply(self, flow: PausedFlow, i: int) -> object:
        """The answer to the flow's question, or `UNANSWERED`.

        A question about the model that nothing answers is raised where it was asked, so that the stage is named.
        """
        if flow.question.scope == "global" and self.sizes.model is None:
            flow.steps.throw(ValueError(_NOT_RANKED))
        return flow.question.reply(self, flow.key, i)

    def _fail(self, i: int) -> None:
        with self.lock:
            self.failed = min(self.failed, i)
            for running in self.running_sums.values():
                running.fail(i)

    # --- answers ---

    def size(self, scope: Whole) -> int:
        """See `Answers`."""
        if scope == "tensor":
            return self.sizes.tensor
        assert self.sizes.model is not None, "the question was refused"
        return self.sizes.model

    def total(self, key: Key, question: Total[Any]) -> object:
        """See `Answers`."""
        with self.lock:
            if key not in self.answers and key in self.model_totals:
                self.answers[key] = question.answer(self.model_totals[key])
            return self.answers.get(key, UNANSWERED)

    def prefix_sum(self, key: Key, i: int, question: PrefixSum) -> Tensor:
        """See `Answers`."""
        with self.lock:
            running = self.running_sums.setdefault(key, RunningSum(failed=self.failed))
        prefix = running.sum_before(i, question.counts)
        return prefix + self.earlier_sums[key] if key in self.earlier_sums else prefix

    def sample_note(self, number: int) -> Sequence[object] | None:
        """See `Answers`."""
        with self.sample_lock:
            if self._sample_hints is None:
                self._sample_hints = self.rehearse()
            return self._sample_hints.get(number)

    def note(self, number: int, values: Sequence[object]) -> None:
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
    rehearse: Callable[[], SampleHints] = dict,
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


def rehearse(start: Callable[[], Flow[Any]], size: int) -> SampleHints:
    """Runs a flow over a sample of ``size`` elements as if the sample were the tensor; returns the flow's notes.

    It stops at the first question about the whole model.
    """
    passes = TensorPasses(lambda _: start(), Sizes(size, size), {}, {}, hold=True)
    passes.run(1, map)
    return passes.notes


class ModelPasses:
    """The passes over tensors of which those of a group are ranked together, until no tensor has an open question.

    It iterates over the numbers of the tensors to visit, pass after pass. Tensors are visited in order, so that equal
    scores of a ranking over the whole model go to the earlier tensor. A visit is `run_slices` with the tensor's
    `model_totals` and `earlier_sums`; `record` takes the question that it ends with.
    """

    def __init__(self, groups: Sequence[Hashable]) -> None:
        self._groups = groups
        self._model_totals: dict[Hashable, dict[Key, Tensor]] = defaultdict(dict)
        self._earlier_sums: dict[Hashable, EarlierSums] = defaultdict(dict)
        self._open_totals: dict[Hashable, OpenTotal] = {}
        self._unfinished: list[int] = []

    def __iter__(self) -> Iterator[int]:
        waiting: Sequence[int] = range(len(self._groups))
        while waiting:
            yield from waiting
            for group, open_total in self._open_totals.items():
                self._model_totals[group][open_total.key] = open_total.total
            waiting, self._unfinished = self._unfinished, []
            self._open_totals.clear()
            self._earlier_sums.clear()

    def model_totals(self, i: int) -> ModelTotals:
        """The totals that earlier passes have found over the group of tensor ``i``."""
        return self._model_totals[self._groups[i]]

    def earlier_sums(self, i: int) -> EarlierSums:
        """The prefix sums of this pass over the tensors of its group before tensor ``i``."""
        return self._earlier_sums[self._groups[i]]

    def record(self, i: int, open_total: OpenTotal | None) -> None:
        """Adds the open question of tensor ``i`` to that of its group; None means that the tensor is finished."""
        if open_total is not None:
            group = self._groups[i]
            group_total = self._open_totals.get(group)
            self._open_totals[group] = open_total if group_total is None else group_total.joined(open_total)
            self._unfinished.append(i)


def run_tensors(groups: Sequence[Hashable], visit: Callable[[int, ModelTotals, EarlierSums], OpenTotal | None]) -> None:
    """Visits tensors by ``visit(i, model_totals, earlier_sums)`` in the order of `ModelPasses`."""
    passes = ModelPasses(groups)
    for i in passes:
        passes.record(i, visit(i, passes.model_totals(i), passes.earlier_sums(i)))
