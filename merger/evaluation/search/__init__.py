"""Searching: the values that a recipe leaves open, found by merging in memory and judging on held-out examples."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger.checkpoint.files import make_folder
from merger.errors import RecipeError
from merger.evaluation import tasks
from merger.evaluation.references import family_of
from merger.evaluation.scores import Comparison, Entry, check_objective, compare, objective, objective_text, versions
from merger.evaluation.search import results
from merger.evaluation.search.loop import Trial, best_of, explore
from merger.evaluation.search.record import Record
from merger.evaluation.search.space import Point, Space, example, spaces
from merger.evaluation.search.strategies import ENDLESS, STRATEGIES
from merger.options import RunOptions, check_options, path_argument
from merger.pipeline.registry import ENTRIES, SCORES
from merger.recipe.document import Document, read
from merger.recipe.input_locations import check_inputs
from merger.recipe.recipe import Recipe, overridden, search_of
from merger.recipe.sections import Evaluation, Search

if TYPE_CHECKING:
    from merger.evaluation.model_host import ModelHost

__all__ = ["SearchResult", "search"]


@dataclass(frozen=True, repr=False)
class SearchResult:
    """The result of a search."""

    folder: str  # trials.jsonl, best.yaml and report.md
    objective: str
    trials: dict[str, tuple[Trial, ...]]  # by variant; under no name where there are none
    best: dict[str, Trial]  # by variant
    report: Comparison  # of examples that the search never saw

    @property
    def winner(self) -> Trial:
        """The best trial of all by the search's own examples; the report chose nothing."""
        winner = best_of(list(self.best.values()))
        assert winner is not None
        return winner

    def objective_text(self, trial: Trial) -> str:
        """The objective of a trial that worked, for people."""
        assert trial.objective is not None, "the trial worked"
        measures = {name: task.measure for name, task in self.report.tasks.items()}
        return objective_text(self.objective, trial.objective, measures)

    def __repr__(self) -> str:
        count = sum(map(len, self.trials.values()))
        return (
            f"SearchResult({count} trials; {self.objective} {self.objective_text(self.winner)} at best; {self.folder})"
        )

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def as_json(self) -> dict[str, Any]:
        """A plain dictionary for machines."""
        return {**asdict(self), "winner": asdict(self.winner), "report": self.report.as_json()}


def search(
    path: str | Path,
    overrides: Sequence[str] = (),
    options: RunOptions = RunOptions(),
    *,
    to: Path | None = None,
    force: bool = False,
    allow_calibration_text: bool = False,
) -> SearchResult:
    """Finds the values that a recipe leaves open, and reports on the best ones with examples the search never saw.

    All that is computed is on record in the folder ``to`` (RECIPE.search beside the recipe, if None), and the same
    call goes on from there. Raises a `MergerError` for whatever the user can mend.
    """
    from merger.evaluation.model_host import ModelHost

    check_options(options)
    path = path_argument("path", path)
    document = overridden(read(path), overrides)
    settings = search_of(document)
    variants = spaces(document, settings.variants, overrides)
    section = _check_recipe(path, settings, variants)
    family = family_of({name or path.stem: example(space) for name, space in variants.items()})
    check_inputs(*map(example, variants.values()), with_evaluation=True)
    split = tasks.split(section.data, family.folder, section.samples, settings.samples)
    check_objective(settings.objective, split.search)
    if not allow_calibration_text:
        for space in variants.values():
            tasks.check_apart(example(space), (*split.search, *split.report))
    folder = to or path.with_name(f"{path.stem}.search")
    results.check_folder(folder)
    with ModelHost(options, section.dtype) as model_host:
        search_run = _Search(settings, section, family, split, model_host)
        make_folder(folder)
        with closing(Record(folder / "trials.jsonl", search_run.decisive(document, variants), force=force)) as record:
            references = search_run.references(record)
            trials = {
                name: tuple(search_run.trials(name, space, references["search"], record))
                for name, space in variants.items()
            }
            best = {
                name: top for name, variant_trials in trials.items() if (top := best_of(variant_trials)) is not None
            }
            if not best:
                raise RecipeError(f"{record.path}: no trial made a merge that could be judged; the lines say why")
            report = search_run.report(path.stem, variants, best, references["report"], record)
    result = SearchResult(str(folder), settings.objective, trials, best, report)
    results.write(result, folder, variants[result.winner.variant], path)
    return result


def _check_recipe(path: Path, settings: Search, variants: Mapping[str, Space]) -> Evaluation:
    """The section ``evaluation``; RecipeError for what can be told to be wrong before anything is read."""
    for name, space in variants.items():
        if not space.dimensions and not settings.variants:
            raise RecipeError(f"{path}: leaves nothing open; write {{search: [...]}} where a value stands")
        if settings.strategy in ENDLESS and settings.trials is None:
            raise RecipeError(f"{path}: search.trials: is missing; {settings.strategy} has no end of its own")
        for dimension in space.dimensions:
            if dimension.path[0] in ("base", "evaluation", "output") or dimension.path[-1] in ("model", "adapter"):
                raise RecipeError(f"{path}: {dimension.name}: is no value that a search can move {name}".rstrip())
        next(STRATEGIES[settings.strategy](space, settings.seed))  # which says what it needs
    section = example(next(iter(variants.values()))).evaluation
    if section is None:
        raise RecipeError(f"{path}: has no evaluation: {{data: {{TASK: FILE}}}}, by which a search could judge")
    return section


def _method_versions(value: Any) -> dict[str, str]:
    """The versions of installed packages, other than merger, with a method that some text in a recipe names."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return {name: version for item in value for name, version in _method_versions(item).items()}
    entries = [table[value] for table in (ENTRIES, SCORES) if isinstance(value, str) and value in table]
    return dict(entry.package for entry in entries if entry.package is not None)


class _Search:
    """The state that all trials of a search share."""

    def __init__(
        self, settings: Search, section: Evaluation, family: Recipe, split: tasks.Split, model_host: ModelHost
    ) -> None:
        from merger.evaluation.evaluator import Evaluator

        self.settings, self.split, self.model_host, self.family = settings, split, model_host, family
        self.evaluator = Evaluator(model_host, family, split.search, section.max_tokens)
        self.report_evaluator = Evaluator(model_host, family, split.report, section.max_tokens)

    def decisive(self, document: Document, variants: Mapping[str, Space]) -> dict[str, Any]:
        """What decides trials and report: all of the recipe but where its output goes and how many trials there are.

        And all that is read for it: models, tokenizers, text and statistics, held-out examples.
        """
        from merger.calibration.origins import calibration_files, fingerprint, tokenizer_digest
        from merger.planning.planner import open_models

        output = {**document.value["output"], "path": None, "shard_size": None}
        decisive_recipe = {
            **document.value,
            "output": output,
            "search": {**document.value.get("search", {}), "trials": None},
        }
        models = open_models(self.family, offline=self.model_host.options.offline, headers_only=False)
        try:
            inputs = {label: [fingerprint(model), tokenizer_digest(model)] for label, model in models.items()}
        finally:
            for model in models.values():
                model.close()
        return {
            "recipe": hashlib.sha256(json.dumps(decisive_recipe, default=str).encode()).hexdigest(),
            "inputs": inputs,
            "calibration": {name: calibration_files(example(space)) for name, space in variants.items()},
            "ends of replies": list(self.evaluator.task_evaluator.ends),
            "search data": {task.name: task.sha256 for task in self.split.search},
            "report data": {task.name: task.sha256 for task in self.split.report},
            "forward passes": f"{self.evaluator.dtype} on {self.model_host.device.type}",
            "versions": {**versions(), **_method_versions(document.value)},
        }

    def trials(self, variant: str, space: Space, references: Sequence[Entry], record: Record) -> Iterator[Trial]:
        """All trials of a variant, given what base and experts do with the search data."""

        def evaluate_point(space: Space, point: Point) -> tuple[float, dict[str, float], float, float]:
            began = time.monotonic()
            model = self.evaluator.merged(variant, space.recipe(point))
            merged = time.monotonic()
            entry = Entry(variant, "merge", self.evaluator.tasks_of(model).outcomes(model.model))
            value = objective(self.settings.objective, self.split.search, [*references, entry])
            values = {task: outcome.value for task, outcome in entry.outcomes.items()}
            return value, values, merged - began, time.monotonic() - merged

        strategy = STRATEGIES[self.settings.strategy](space, self.settings.seed)
        say, limit = self.model_host.options.notice, self.settings.trials
        measures = {task.name: task.measure for task in self.split.search}
        so_far: list[Trial] = []
        for trial in explore(variant, space, strategy, limit, record, evaluate_point, say):
            so_far.append(trial)
            say(results.line(trial, best_of(so_far), limit, self.settings.objective, measures))
            self.model_host.options.progress(f"searching {variant}".rstrip(), trial.trial, limit or trial.trial)
            yield trial

    def report(
        self,
        name: str,
        variants: Mapping[str, Space],
        best: Mapping[str, Trial],
        references: Sequence[Entry],
        record: Record,
    ) -> Comparison:
        """The best of every variant on examples that no trial has seen, beside base and experts."""
        entries = [*references]
        for variant, trial in best.items():
            setting = results.setting(trial.point)
            key = f"report {variant} {json.dumps(trial.point, sort_keys=True)}"
            outcomes = record.outcomes(key)
            if outcomes is None:
                outcomes = dict(
                    self.report_evaluator.merge(variant or name, variants[variant].recipe(trial.point)).outcomes
                )
                record.add_outcomes(key, outcomes)
            entries.append(Entry(variant or name, "merge", outcomes, setting))
        return compare(self.split.report, entries, self.evaluator.dtype)

    def references(self, record: Record) -> dict[str, list[Entry]]:
        """Base and experts by both kinds of data; each model is loaded once, and not at all if it is on record."""
        from merger.evaluation.evaluator import kind_of

        evaluators = {"search": self.evaluator, "report": self.report_evaluator}
        names = ["base", *self.family.experts]
        recorded = {(part, name): record.outcomes(f"{part} {name}") for part in evaluators for name in names}
        if any(outcomes is None for outcomes in recorded.values()):
            for model in self.evaluator.models():
                for part, evaluator in evaluators.items():
                    if recorded[part, model.label] is None:
                        recorded[part, model.label] = evaluator.outcomes(model)
                        record.add_outcomes(f"{part} {model.label}", recorded[part, model.label] or {})
        return {part: [Entry(name, kind_of(name), recorded[part, name] or {}) for name in names] for part in evaluators}
