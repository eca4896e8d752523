"""Evaluation of one family on the same tasks: the base, the experts, and merges in memory or in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from merger.calibration.samples import load_tokenizer
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.opening import open_checkpoint
from merger.checkpoint.tensor_kinds import text_config
from merger.checkpoint.tokenizers import tokenizer_folder
from merger.errors import checkpoint_faults
from merger.evaluation.harness import Harness
from merger.evaluation.measures import Outcome, TaskEvaluator, ends_of, tokenize_task
from merger.evaluation.model_host import ModelHost
from merger.evaluation.scores import Entry
from merger.evaluation.tasks import Task
from merger.planning.planner import open_models
from merger.recipe.recipe import Recipe


class Evaluator:
    """Evaluates the models of a family; all of them get the tasks tokenised by the base's tokenizer."""

    def __init__(
        self,
        model_host: ModelHost,
        family: Recipe,
        tasks: Sequence[Task],
        max_tokens: int,
        harness: Harness | None = None,
    ) -> None:
        self.model_host, self.family, self.harness = model_host, family, harness
        with _open(model_host, family.base.model, family.base.adapter, "base", family.folder) as base:
            tokenizer = load_tokenizer(
                tokenizer_folder(base), "base", trust_remote_code=model_host.options.trust_remote_code
            )
            with checkpoint_faults("base: its tokenizer cannot read the tasks"):
                limit = min(max_tokens, tokenizer.model_max_length, _positions(base) or max_tokens)
                ends = ends_of(base.directory, tokenizer)
                tokenized_tasks = tuple(tokenize_task(task, tokenizer, limit) for task in tasks)
            self.dtype = str(model_host.dtype_for(base)).removeprefix("torch.")
        self.task_evaluator = TaskEvaluator(tokenized_tasks, tokenizer, ends)

    def references(self) -> Iterator[Entry]:
        """The outcomes of the base, then of the experts in the recipe's order."""
        for label, model in self.models():
            yield self._entry(label, kind_of(label), model)

    def models(self) -> Iterator[tuple[str, Any]]:
        """The base and the experts as transformers models, one after the other."""
        models = open_models(self.family, offline=self.model_host.options.offline, headers_only=False)
        try:
            for label, model in models.items():
                yield label, self.model_host.model_of(model)
        finally:
            for model in models.values():
                model.close()

    def merge(self, label: str, subject: Recipe | Path, setting: str = "") -> Entry:
        """The outcomes of a merge, which is computed in memory from a recipe or read from a folder."""
        if isinstance(subject, Recipe):
            return self._entry(label, "merge", self.model_host.merged(subject)[0], setting)
        with _open(self.model_host, str(subject), None, label, Path()) as checkpoint:
            return self._entry(label, "merge", self.model_host.model_of(checkpoint), setting)

    def outcomes(self, model: Any, label: str) -> dict[str, Outcome]:
        """The outcomes of a model by task; progress and faults are reported under its label."""
        with checkpoint_faults(f"{label}: the model cannot be judged by text"):
            return self.task_evaluator.outcomes(model, partial(self.model_host.options.progress, f"judging {label}"))

    def _entry(self, label: str, kind: Literal["base", "expert", "merge"], model: Any, setting: str = "") -> Entry:
        outcomes = self.outcomes(model, label)
        if self.harness is None:
            return Entry(label, kind, outcomes, setting)
        tell = partial(self.model_host.options.progress, f"judging {label} by lm-eval")
        tell(0, 1)
        scores = self.harness.scores(model, self.task_evaluator.tokenizer, label)
        tell(1, 1)
        return Entry(label, kind, outcomes, setting, scores)


def kind_of(label: str) -> Literal["base", "expert"]:
    """The kind of a model, by its label in the recipe."""
    return "base" if label == "base" else "expert"


def _open(model_host: ModelHost, model: str, adapter: str | None, label: str, folder: Path) -> Checkpoint:
    return open_checkpoint(model, adapter, label=label, folder=folder, offline=model_host.options.offline)


def _positions(model: Checkpoint) -> int | None:
    """The context length of a model in tokens, if its config has one."""
    config = text_config(model.config)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return positions if isinstance(positions, int) else None
