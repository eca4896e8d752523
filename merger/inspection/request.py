"""What the user asks an inspection for, beside what every inspection counts."""

from __future__ import annotations

from dataclasses import dataclass

from merger.inspection.counters import Counter, Subject
from merger.inspection.statistic import statistics


@dataclass(frozen=True, order=True)
class ViewKey:
    """One view of the model, by its place in the pipeline."""

    group: int  # of tensors: the recipe's own method, or a rule
    stage: int
    name: str
    subject: Subject


TASK_VECTORS = ViewKey(-1, -1, "task_vectors", "experts")
RESULT = ViewKey(10**6, 0, "result", "merged")


@dataclass(frozen=True)
class InspectionRequest:
    """What takes longer, or is about one tensor."""

    picture: str | None = None  # the tensor whose density is mapped
    statistics: frozenset[str] = frozenset()  # "rank", "subspaces": groups of statistics
    curves: bool = False

    def counters(self, view: ViewKey) -> list[type[Counter]]:
        """The counters that a view's statistics need."""
        declared = [entry for entry in statistics(view.subject) if entry.applies(view.name, self.statistics)]
        needed = dict.fromkeys(counter for entry in declared for counter in entry.counters)
        return [counter for counter in needed if counter.subject == view.subject]
