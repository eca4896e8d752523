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
class Wanted:
    """Which tasks are to be run, and how, in the harness's own words."""

    tasks: tuple[str, ...]  # tasks, groups and tags by name, or patterns such as arc_*
    include_path: Path | None = None  # a folder that holds further tasks, as YAML files
    limit: int | None = None  # of each task only the first examples; None: all
    num_fewshot: int | None = None  # None: as each task says


@dataclass(frozen=True)
class Metric:
    """A figure that the harness gives of every model."""

    task: str
    metric: str  # with its filter, if it has one
    higher_is_better: bool | None  # None where the harness does not say
    examples: int | None  # None for a group
    num_fewshot: int | None
    version: str  # of the task

    @property
    def name(self) -> str:
        """By which tables know it."""
        return f"{self.task} {self.metric}"


@dataclass(frozen=True)
class Score:
    """A figure of one model."""

    value: float
    stderr: float | None  # the harness's own standard error, over the task's examples


Scores = Mapping[Metric, Score]


@dataclass(frozen=True)
class Harness:
    """Tasks that are loaded with their data, for any number of models."""

    wanted: Wanted
    manager: Any  # lm_eval's own
    chosen: tuple[Any, ...]  # its tasks and groups
    names: tuple[str, ...]  # of these
    offline: bool

    def scores(self, model: Any, tokenizer: Any, label: str) -> dict[Metric, Score]:
        """What the harness finds for a loaded transformers model; CheckpointError where it stops."""
        with _shut(self.offline):
            import lm_eval
            from lm_eval.models.huggingface import HFLM

            try:
                found = lm_eval.simple_evaluate(
                    # in float32, as bfloat16 holds no more than three digits of a log-probability
                    HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH, softmax_dtype="float32"),
                    tasks=list(self.chosen),
                    num_fewshot=self.wanted.num_fewshot,
                    limit=self.wanted.limit,
                    task_manager=self.manager,
                    log_samples=False,
                )
            except Exception as error:  # a task's own templates and functions may raise anything
                raise CheckpointError(f"--lm-eval: the harness stopped at {label}: {_said(error)}") from error
        return dict(_read(found, self.names))


def load(wanted: Wanted, *, offline: bool) -> Harness:
    """The tasks with their data, before any model is loaded.

    RecipeError without the package or for a name that it does not know, CheckpointError for a task that it cannot load.
    """
    if wanted.include_path is not None and not wanted.include_path.is_dir():
        raise RecipeError(f"--include-path {wanted.include_path}: there is no such folder")
    manager = _manager(wanted.include_path)
    chosen: dict[str, Any] = {}
    for name in _names(wanted.tasks, manager):
        chosen |= _loaded(name, manager, offline)
    return Harness(wanted, manager, tuple(chosen.values()), tuple(chosen), offline)


def _manager(include_path: Path | None) -> Any:
    """The harness's index of tasks."""
    with _shut(offline=False):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RecipeError(
                f"--lm-eval needs lm-evaluation-harness ({error}): pip install 'merger[lm-eval]'"
            ) from None
        return TaskManager(include_path=None if include_path is None else str(include_path))


def _names(asked: Sequence[str], manager: Any) -> list[str]:
    """The names that are meant; RecipeError for those that there are not."""
    matched = {each: manager.match_tasks([each]) for each in asked}
    faults = [
        f"--lm-eval: there is no task {each!r}; " + _near(each, manager) for each, found in matched.items() if not found
    ]
    if faults:
        raise RecipeError(faults)
    return list(dict.fromkeys(name for found in matched.values() for name in found))


def _near(name: str, manager: Any) -> str:
    """A clause that offers the names that were probably meant: there are thousands."""
    close = difflib.get_close_matches(name, manager.all_tasks)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "`lm-eval ls tasks` lists them"


def _loaded(name: str, manager: Any, offline: bool) -> dict[str, Any]:
    """A task or group by its name, or all tasks of a tag."""
    with _shut(offline):
        try:
            found = manager.load(name)
        except Exception as error:  # a task's own templates and functions, and whatever fetches its data
            hint = "; --offline takes only data that is in the cache" if offline else ""
            raise CheckpointError(f"--lm-eval {name}: cannot be loaded: {_said(error)}{hint}") from error
    for task, each in found["tasks"].items():
        if getattr(each, "UNSAFE_CODE", False):
            raise RecipeError(f"--lm-eval {name}: {task} runs code that the model writes, which merger does not do")
    groups: dict[str, Any] = found.get("groups", {})
    return {name: groups[name]} if name in groups else dict(found["tasks"])


def _read(found: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[Metric, Score]]:
    """The figures of these tasks; of a group that has none of its own those of its members."""
    for name in names:
        figures = {key: each for key, each in found["results"].get(name, {}).items() if "," in key}
        if not figures:
            yield from _read(found, found["group_subtasks"].get(name, []))
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{filtered}")
            yield (
                Metric(
                    task=name,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    higher_is_better=found["higher_is_better"].get(name, {}).get(metric),
                    examples=found["n-samples"].get(name, {}).get("effective"),
                    num_fewshot=found["n-shot"].get(name),
                    version=str(found["versions"].get(name, "")),
                ),
                Score(float(value), float(stderr) if isinstance(stderr, int | float) else None),
            )


def _said(error: Exception) -> str:
    """An error in a line."""
    said = printable(" ".join(str(error).split()))
    return f"{type(error).__name__}: {said if len(said) <= 300 else said[:300] + '...'}"


@contextmanager
def _shut(offline: bool) -> Iterator[None]:
    """Keeps the harness's logs, bars and warnings from the terminal, and if asked its libraries from the network.

    What goes wrong comes as an exception.
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
            stack.enter_context(_switched_off())
        yield


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Drops what programs that the harness starts write there: it asks git for a commit, others about the machine."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _switched_off() -> Iterator[None]:
    """Sets what the environment sets only before these libraries are imported, and sets it back."""
    import datasets
    import evaluate
    import huggingface_hub

    switches = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (evaluate.config, "HF_EVALUATE_OFFLINE"),
    ]
    before = [getattr(module, name) for module, name in switches]
    try:
        for module, name in switches:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
