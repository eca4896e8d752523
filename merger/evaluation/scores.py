"""Scores from models' outcomes on examples: measures, shares of gains kept, intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal

import numpy as np

from merger._display import html_table, name_list
from merger.engine import manifest
from merger.errors import RecipeError, nearest
from merger.evaluation.harness import Metric, Score, Scores
from merger.evaluation.measures import Outcome, Outcomes
from merger.evaluation.tasks import Task

RESAMPLES = 2000
"""Of the bootstrap: the ends of its intervals then move by about a fiftieth of their width from seed to seed."""

COVERED = 0.95
"""How often an interval holds what examples drawn anew would give."""

OBJECTIVES = ("kept", "worst", "mean", "loss")


@dataclass(frozen=True)
class Estimate:
    """A figure, and the interval it may lie in for other examples of the same kind."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TaskSummary:
    """The tasks by name, and whether more is better in each."""

    measure: Literal["loss", "accuracy"]
    examples: int
    sha256: str  # of the examples


@dataclass(frozen=True)
class Shortfall:
    """A task on which a merge is worse than the base or the best expert, beyond the choice of examples."""

    task: str
    kind: Literal["base", "expert"]  # of the better model
    model: str
    difference: Estimate  # by how much the merge's loss is higher, or its accuracy lower; the interval is above 0


@dataclass(frozen=True)
class Row:
    """One model: each task's measure, and what it kept of the experts' gains."""

    model: str
    kind: Literal["base", "expert", "ideal", "merge"]
    setting: str  # what a search found for it, or nothing
    tasks: dict[str, Estimate]
    mean: Estimate | None  # over all tasks; None where lm-evaluation-harness alone judges
    kept_of: dict[str, Estimate]  # by expert: (model - base) / (expert - base) on the task of its name
    kept: Estimate | None  # the mean of these; None where no task has an expert that gained
    behind: Estimate | None  # of a merge: how much less it kept than the best merge
    below: tuple[Shortfall, ...]  # of a merge: the tasks on which base or best expert are better, by kind
    lm_eval: dict[str, Score]  # by the name of a metric


@dataclass(frozen=True, repr=False)
class Comparison:
    """Models side by side on the same examples."""

    tasks: dict[str, TaskSummary]
    lm_eval: dict[str, Metric]  # what lm-evaluation-harness measured besides, by its name in tables
    rows: tuple[Row, ...]
    dtype: str  # of the forward passes
    versions: dict[str, str]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Comparison({name_list([row.model for row in self.rows])} on {name_list([*self.tasks, *self.lm_eval])})"

    def _repr_html_(self) -> str:
        return html_table("Comparison", ("model", *self.tasks, "kept"), [self._cells(row) for row in self.rows])

    def _cells(self, row: Row) -> list[str]:
        values = [f"{row.tasks[name].value:.4f}" if name in row.tasks else "" for name in self.tasks]
        return [row.model, *values, "" if row.kept is None else f"{row.kept.value:.3f}"]

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines, as `json_schema` describes it."""
        return asdict(self)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `Comparison.as_json`."""
    from pydantic import TypeAdapter

    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(Comparison).json_schema()}


@dataclass(frozen=True)
class Entry:
    """A model and its outcomes."""

    model: str
    kind: Literal["base", "expert", "ideal", "merge"]
    outcomes: Outcomes
    setting: str = ""
    lm_eval: Scores = field(default_factory=dict)


def compare(tasks: Sequence[Task], entries: Sequence[Entry], dtype: str) -> Comparison:
    """The table of these models; every interval resamples the same examples for all of them."""
    notes = list(_without_gain(tasks, entries))
    with np.errstate(divide="ignore", invalid="ignore"):  # examples on which an expert gains nothing have no share
        rows = _Bootstrap(tasks, entries).rows()
    summaries = {task.name: TaskSummary(_measure(task), len(task.examples), task.sha256) for task in tasks}
    metrics = {metric.name: metric for entry in entries for metric in entry.lm_eval}
    package_versions = versions() | ({"lm_eval": metadata.version("lm_eval")} if metrics else {})
    return Comparison(summaries, metrics, tuple(rows), dtype, package_versions, tuple(notes))


def versions() -> dict[str, str]:
    """Returns the versions of the computation: the merge's own, and transformers."""
    return {**manifest.merge_versions(), "transformers": metadata.version("transformers")}


def _measure(task: Task) -> Literal["loss", "accuracy"]:
    return "loss" if task.kind == "text" else "accuracy"


def objective(name: str, tasks: Sequence[Task], entries: Sequence[Entry]) -> float:
    """How good the last of the entries is, the higher the better: a loss counts as its negative.

    RecipeError for an objective that there is not, or that says nothing of these models.
    """
    measures = {task.name: task.measure for task in tasks}
    values = {task: outcome.value for task, outcome in entries[-1].outcomes.items()}
    if name in measures:
        return values[name] if measures[name] == "accuracy" else -values[name]
    losses = [value for task, value in values.items() if measures[task] == "loss"]
    if name == "loss" and losses:
        return -float(np.mean(losses))
    if name == "mean":
        signed = [value if measures[task] == "accuracy" else -value for task, value in values.items()]
        return float(np.mean(signed))
    if name not in ("kept", "worst"):
        raise RecipeError(f"search.objective: there is no {name!r}; {nearest(name, [*OBJECTIVES, *measures])}")
    shares = shares_kept(tasks, entries)[-1]
    if not shares:
        raise RecipeError(f"search.objective: {name}: no expert is better than the base on a task of its own name")
    return float(min(shares.values()) if name == "worst" else np.mean([*shares.values()]))


def objective_text(name: str, value: float, measures: Mapping[str, str]) -> str:
    """An objective for people: a loss as it is, and not as the negative by which it is ranked.

    ``measures`` are those of the tasks by name.
    """
    is_loss = measures.get(name, name) == "loss"
    return f"{-value if is_loss else value:.4f}"


def check_objective(name: str, tasks: Sequence[Task]) -> None:
    """RecipeError for an objective that there is not among these tasks."""
    if name not in (*OBJECTIVES, *(task.name for task in tasks)):
        suggestion = nearest(name, [*OBJECTIVES, *(task.name for task in tasks)])
        raise RecipeError(f"search.objective: there is no {name!r}; {suggestion}")
    if name == "loss" and all(task.measure != "loss" for task in tasks):
        raise RecipeError("search.objective: loss: no task is of plain text; use mean, kept, or a task's name")


def shares_kept(tasks: Sequence[Task], entries: Sequence[Entry]) -> list[dict[str, float]]:
    """Of each entry, the share it keeps of each expert's gain over the base on the task of the expert's name."""
    base = next(candidate for candidate in entries if candidate.kind == "base")
    gained = list(_expert_gains(tasks, entries))
    return [
        {
            name: _share(entry.outcomes[name].value, base.outcomes[name].value, expert_value)
            for name, expert_value in gained
        }
        for entry in entries
    ]


def _share(value: Any, base: Any, expert: Any) -> Any:
    return (value - base) / (expert - base)


def _expert_gains(tasks: Sequence[Task], entries: Sequence[Entry]) -> list[tuple[str, float]]:
    """The experts that are better than the base on their own task, with their measure there."""
    base = next(candidate for candidate in entries if candidate.kind == "base")
    gains = []
    for task in tasks:
        for entry in entries:
            if entry.kind == "expert" and entry.model == task.name:
                expert_value, start = entry.outcomes[task.name].value, base.outcomes[task.name].value
                if (expert_value > start) if task.measure == "accuracy" else (expert_value < start):
                    gains.append((task.name, expert_value))
    return gains


def _without_gain(tasks: Sequence[Task], entries: Sequence[Entry]) -> list[str]:
    if not tasks:
        return []
    gained = {name for name, _ in _expert_gains(tasks, entries)}
    names = {task.name for task in tasks}
    return [
        f"{entry.model}: is not better than the base on its own task, so there is no gain that a merge could keep"
        if entry.model in names
        else f"{entry.model}: no task is named as it is, so what a merge keeps of its gain is not told"
        for entry in entries
        if entry.kind == "expert" and entry.model not in gained
    ]


class _Bootstrap:
    """The measures of all models, the first of each as found and the rest for examples drawn with replacement."""

    def __init__(self, tasks: Sequence[Task], entries: Sequence[Entry]) -> None:
        self.tasks, self.entries = tasks, entries
        rng = np.random.default_rng(0)
        self.values: dict[tuple[str, str], np.ndarray] = {}  # by model and task: [1 + RESAMPLES]
        for task in tasks:
            n = len(task.examples)
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
            counts = np.concatenate([np.ones((1, n)), drawn])
            for entry in entries:
                self.values[entry.model, task.name] = _measure_draws(entry.outcomes[task.name], counts)
        self.base = next(candidate.model for candidate in entries if candidate.kind == "base")
        self.experts = [entry.model for entry in entries if entry.kind == "expert"]
        self.gained = [name for name, _ in _expert_gains(tasks, entries)]

    def rows(self) -> list[Row]:
        """One for each model, and after the experts the ideal: the best of them on every task."""
        mean_shares = {entry.model: self._mean_share(self._values_of(entry.model)) for entry in self.entries}
        merges = [entry.model for entry in self.entries if entry.kind == "merge"]
        best = max(merges, key=lambda model: mean_shares[model][0]) if merges and self.gained else None
        rows = []
        for entry in self.entries:
            shortfall = None if entry.kind != "merge" or best is None else mean_shares[best] - mean_shares[entry.model]
            rows.append(self._row(entry, self._values_of(entry.model), shortfall))
        experts = [entry for entry in self.entries if entry.kind == "expert"]
        if experts:
            place = 1 + max(i for i, entry in enumerate(self.entries) if entry.kind == "expert")
            ideal = Entry("ideal", "ideal", {}, lm_eval=_best([entry.lm_eval for entry in experts]))
            ideal_values = {task.name: self.values[self._best_expert(task), task.name] for task in self.tasks}
            rows.insert(place, self._row(ideal, ideal_values, None))
        return rows

    def _values_of(self, model: str) -> dict[str, np.ndarray]:
        return {task.name: self.values[model, task.name] for task in self.tasks}

    def _best_expert(self, task: Task) -> str:
        """The expert that is the best on a task on the examples as they are."""
        best = max if task.measure == "accuracy" else min
        return best(self.experts, key=lambda model: self.values[model, task.name][0])

    def _shortfalls(self, merge: str) -> Iterator[Shortfall]:
        """The tasks on which a merge is below the base, then those on which it is below the best expert."""
        references: list[tuple[Literal["base", "expert"], Task, str]] = [
            ("base", task, self.base) for task in self.tasks
        ]
        references += [("expert", task, self._best_expert(task)) for task in self.tasks if self.experts]
        for kind, task, model in references:
            sign = -1 if task.measure == "accuracy" else 1
            difference = _estimate(sign * (self.values[merge, task.name] - self.values[model, task.name]))
            if difference.low > 0:
                yield Shortfall(task.name, kind, model, difference)

    def _shares(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            name: _share(values[name], self.values[self.base, name], self.values[name, name]) for name in self.gained
        }

    def _mean_share(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        shares = self._shares(values)
        mean_share: np.ndarray = np.mean([*shares.values()], axis=0) if shares else np.zeros(1)
        return mean_share

    def _row(self, entry: Entry, values: Mapping[str, np.ndarray], shortfall: np.ndarray | None) -> Row:
        return Row(
            model=entry.model,
            kind=entry.kind,
            setting=entry.setting,
            tasks={name: _estimate(measures) for name, measures in values.items()},
            mean=_estimate(np.mean([*values.values()], axis=0)) if values else None,
            kept_of={name: _estimate(share) for name, share in self._shares(values).items()},
            kept=_estimate(self._mean_share(values)) if self.gained else None,
            behind=None if shortfall is None else _estimate(shortfall),
            below=tuple(self._shortfalls(entry.model)) if entry.kind == "merge" else (),
            lm_eval={metric.name: score for metric, score in entry.lm_eval.items()},
        )


def _best(models: Sequence[Scores]) -> Scores:
    """The best of every metric of which it is known what is better."""
    best_scores = {}
    for metric in models[0]:
        if metric.higher_is_better is not None:
            best = max if metric.higher_is_better else min
            best_scores[metric] = best((scores[metric] for scores in models), key=lambda score: score.value)
    return best_scores


def _measure_draws(outcome: Outcome, counts: np.ndarray) -> np.ndarray:
    """The measure for each drawing of examples: [draws]; nothing where a drawing holds no token."""
    measured: np.ndarray = (counts @ outcome.total) / (counts @ outcome.weight)
    return measured


def _estimate(values: np.ndarray) -> Estimate:
    """The figure as found, first of ``values``, and the interval that the rest of them say."""
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(drawn, [(1 - COVERED) / 2, (1 + COVERED) / 2]) if len(drawn) else (values[0], values[0])
    return Estimate(float(values[0]), float(low), float(high))
