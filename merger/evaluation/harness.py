"""Tasks of lm-evaluation-harness, which its own API runs on models that are in memory already."""

from __future__ import annotations

import copy
import difflib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merger.errors import CheckpointError, RecipeError, printable

BATCH = 8
"""Sequences of a batch. A 135M model on two cores took 0.5 s for 64 choices of some nine tokens, and 1.8 s one by one;
the logits of a batch, its tokens times the vocabulary in float32, are the largest thing in memory."""


@dataclass(frozen=True)
class HarnessTasks:
    """The tasks to run and their options, named as in lm-evaluation-harness."""

    tasks: tuple[str, ...]  # tasks, groups and tags by name, or patterns such as arc_*
    include_path: Path | None = None  # a folder that holds further tasks, as YAML files
    limit: int | None = None  # of each task only the first examples; None: all
    num_fewshot: int | None = None  # None: as each task says


@dataclass(frozen=True)
class Metric:
    """A metric of one task, which the harness computes for every model."""

    task: str
    metric: str  # with its filter, if it has one
    higher_is_better: bool | None  # None where the harness does not say
    examples: int | None  # None for a group
    num_fewshot: int | None
    version: str  # of the task

    @property
    def name(self) -> str:
        """The name of the metric in tables."""
        return f"{self.task} {self.metric}"


@dataclass(frozen=True)
class Score:
    """The value of a metric for one model."""

    value: float
    stderr: float | None  # the harness's own standard error, over the task's examples


Scores = Mapping[Metric, Score]


@dataclass(frozen=True)
class Harness:
    """Tasks that are loaded with their data, for any number of models."""

    request: HarnessTasks
    manager: Any  # lm_eval's own
    harness_tasks: tuple[Any, ...]  # loaded tasks and groups
    names: tuple[str, ...]  # of ``harness_tasks``
    offline: bool

    def scores(self, model: Any, tokenizer: Any, label: str) -> dict[Metric, Score]:
        """The scores of a loaded transformers model; CheckpointError if the harness raises."""
        with _quiet_harness(self.offline):
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            try:
                results = lm_eval.simple_evaluate(
                    # in float32, as bfloat16 holds no more than three digits of a log-probability
                    HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH, softmax_dtype="float32"),
                    tasks=list(self.harness_tasks),
                    num_fewshot=self.request.num_fewshot,
                    limit=self.request.limit,
                    task_manager=self.manager,
                    log_samples=False,
                )
            except Exception as error:  # a task's own templates and functions may raise anything
                raise CheckpointError(f"lm_eval=TASKS: the harness stopped at {label}: {_error_line(error)}") from error
        return dict(_read_scores(results, self.names))


def load(request: HarnessTasks, *, offline: bool) -> Harness:
    """The tasks with their data, before any model is loaded.

    RecipeError without the package or for a name that it does not know, CheckpointError for a task that it cannot load.
    """
    if request.include_path is not None and not request.include_path.is_dir():
        raise RecipeError(f"include_path='{request.include_path}': there is no such folder")
    manager = _manager(request.include_path)
    harness_tasks: dict[str, Any] = {}
    for name in _matched_names(request.tasks, manager):
        harness_tasks |= _load_tasks(name, manager, offline)
    return Harness(request, manager, tuple(harness_tasks.values()), tuple(harness_tasks), offline)


def _manager(include_path: Path | None) -> Any:
    """The harness's index of tasks."""
    with _quiet_harness(offline=False):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RecipeError(
                f"lm_eval=TASKS needs lm-evaluation-harness ({error}): pip install 'merger[lm-eval]'"
            ) from None
        return TaskManager(include_path=None if include_path is None else str(include_path))


def _matched_names(patterns: Sequence[str], manager: Any) -> list[str]:
    """The task names that match the patterns; RecipeError for a pattern without a match."""
    matched = {pattern: manager.match_tasks([pattern]) for pattern in patterns}
    faults = [
        f"lm_eval=TASKS: there is no task {pattern!r}; " + _suggestion(pattern, manager)
        for pattern, task_names in matched.items()
        if not task_names
    ]
    if faults:
        raise RecipeError(faults)
    return list(dict.fromkeys(name for task_names in matched.values() for name in task_names))


def _suggestion(name: str, manager: Any) -> str:
    """A clause that suggests similar names, as the harness has thousands of tasks."""
    close = difflib.get_close_matches(name, manager.all_tasks)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "`lm-eval ls tasks` lists them"


def _load_tasks(name: str, manager: Any, offline: bool) -> dict[str, Any]:
    """A task or group by its name, or all tasks of a tag."""
    with _quiet_harness(offline):
        try:
            index = manager.load(name)
        except Exception as error:  # a task's own templates and functions, and whatever fetches its data
            hint = "; offline=True takes only data that is in the cache" if offline else ""
            raise CheckpointError(f"lm_eval='{name}': cannot be loaded: {_error_line(error)}{hint}") from error
    for task, harness_task in index["tasks"].items():
        if getattr(harness_task, "UNSAFE_CODE", False):
            raise RecipeError(f"lm_eval='{name}': {task} runs code that the model writes, which merger does not do")
    groups: dict[str, Any] = index.get("groups", {})
    return {name: groups[name]} if name in groups else dict(index["tasks"])


def _read_scores(results: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[Metric, Score]]:
    """The metrics and scores of the named tasks; a group without metrics is replaced by its members."""
    for name in names:
        figures = {key: figure for key, figure in results["results"].get(name, {}).items() if "," in key}
        if not figures:
            yield from _read_scores(results, results["group_subtasks"].get(name, []))
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{filtered}")
            yield (
                Metric(
                    task=name,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    higher_is_better=results["higher_is_better"].get(name, {}).get(metric),
                    examples=results["n-samples"].get(name, {}).get("effective"),
                    num_fewshot=results["n-shot"].get(name),
                    version=str(results["versions"].get(name, "")),
                ),
                Score(float(value), float(stderr) if isinstance(stderr, int | float) else None),
            )


def _error_line(error: Exception) -> str:
    """An error's type and message on one line of at most about 300 characters."""
    message = printable(" ".join(str(error).split()))
    return f"{type(error).__name__}: {message if len(message) <= 300 else message[:300] + '...'}"


@contextmanager
def _quiet_harness(offline: bool) -> Iterator[None]:
    """Hides the harness's logs, progress bars and warnings; with ``offline`` its libraries do not use the network.

    Errors are still raised as exceptions.
    """
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)  # handlers that were made before keep the stream they were made with
        stack.enter_context(_no_stderr())
        if offline:
            stack.enter_context(_forced_offline())
        yield


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Discards the stderr of child processes: the harness starts git and tools that describe the machine."""
    original, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)
        os.close(nowhere)


@contextmanager
def _forced_offline() -> Iterator[None]:
    """Sets the offline flags of the imported libraries, as they read the environment at import; restores them."""
    import datasets
    import evaluate
    import huggingface_hub

    switches = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (evaluate.config, "HF_EVALUATE_OFFLINE"),
    ]
    values = [getattr(module, name) for module, name in switches]
    try:
        for module, name in switches:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(switches, values, strict=True):
            setattr(module, name, value)
