"""Evaluation of one family on the same tasks: the base, the experts, and merges in memory or in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from merger.calibration.samples import load_tokenizer
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.opening import open_checkpoint
from merger.checkpoint.tensor_kinds import text_config
from merger.checkpoint.tokenizers import Tokenizer, tokenizer_folder
from merger.errors import checkpoint_faults
from merger.evaluation.harness import Harness
from merger.evaluation.measures import Outcome, TaskEvaluator, ends_of, tokenize_task
from merger.evaluation.model_host import ModelHost
from merger.evaluation.scores import Entry
from merger.evaluation.tasks import Task
from merger.planning.planner import open_models
from merger.recipe.recipe import Recipe


@dataclass(frozen=True)
class JudgedModel:
    """A transformers model in memory."""

    label: str
    model: Any
    tokens_of: Checkpoint | None  # the checkpoint in whose tokens it gets the tasks; None: those of the base


class Evaluator:
    """Evaluates the models of a family; all of them get the tasks tokenised by the base's tokenizer.

    Where a recipe names the tokenizer of its output, tokens may have other ids in each model, and each gets the tasks
    in its own tokens: the base and the experts if the family's recipe does so, a merge if its own does.
    """

    def __init__(
        self,
        model_host: ModelHost,
        family: Recipe,
        tasks: Sequence[Task],
        max_tokens: int,
        harness: Harness | None = None,
    ) -> None:
        self.model_host, self.family, self.harness = model_host, family, harness
        self._tasks, self._max_tokens = tasks, max_tokens
        self._by_tokenizer: dict[tuple[str, tuple[int, ...]], TaskEvaluator] = {}
        with _open(model_host, family.base.model, family.base.adapter, "base", family.folder) as base:
            self.dtype = str(model_host.dtype_for(base)).removeprefix("torch.")
            self.task_evaluator = self._tokenize(base)

    def references(self) -> Iterator[Entry]:
        """The outcomes of the base, then of the experts in the recipe's order."""
        for model in self.models():
            yield self._entry(model, kind_of(model.label))

    def models(self) -> Iterator[JudgedModel]:
        """The base and the experts, one after the other."""
        models = open_models(self.family, offline=self.model_host.options.offline, headers_only=False)
        try:
            for label, weights in models.items():
                yield JudgedModel(label, self.model_host.model_of(weights), self._own(weights, self.family))
        finally:
            for model in models.values():
                model.close()

    def merge(self, label: str, subject: Recipe | Path, setting: str = "") -> Entry:
        """The outcomes of a merge, which is computed in memory from a recipe or read from a folder."""
        if isinstance(subject, Recipe):
            return self._entry(self.merged(label, subject), "merge", setting)
        with _open(self.model_host, str(subject), None, label, Path()) as weights:
            model = self.model_host.model_of(weights)
            return self._entry(JudgedModel(label, model, self._own(weights, self.family)), "merge", setting)

    def merged(self, label: str, recipe: Recipe) -> JudgedModel:
        """The merge of a recipe in memory, which the next merge may overwrite."""
        model, weights = self.model_host.merged(recipe)
        return JudgedModel(label, model, self._own(weights, recipe))

    def outcomes(self, judged: JudgedModel) -> dict[str, Outcome]:
        """The outcomes of a model by task; progress and faults are reported under its label."""
        with checkpoint_faults(f"{judged.label}: the model cannot be judged by text"):
            tell = partial(self.model_host.options.progress, f"judging {judged.label}")
            return self.tasks_of(judged).outcomes(judged.model, tell)

    def tasks_of(self, judged: JudgedModel) -> TaskEvaluator:
        """The tasks in the tokens that a model reads."""
        return self.task_evaluator if judged.tokens_of is None else self._tokenize(judged.tokens_of)

    def _own(self, weights: Checkpoint, recipe: Recipe) -> Checkpoint | None:
        """The checkpoint itself, if its tasks are to be in its own tokens."""
        return None if recipe.named_tokenizer is None else weights

    def _tokenize(self, weights: Checkpoint) -> TaskEvaluator:
        """The tasks in the tokens of a checkpoint, tokenised once for each tokenizer."""
        folder, label = tokenizer_folder(weights), weights.label
        tokenizer = load_tokenizer(folder, label, trust_remote_code=self.model_host.options.trust_remote_code)
        with checkpoint_faults(f"{label}: its tokenizer cannot read the tasks"):
            ends = ends_of(weights.directory, tokenizer)
            key = Tokenizer(folder).digest, ends
            if key not in self._by_tokenizer:
                limit = min(self._max_tokens, tokenizer.model_max_length, _positions(weights) or self._max_tokens)
                tasks = tuple(tokenize_task(task, tokenizer, limit) for task in self._tasks)
                self._by_tokenizer[key] = TaskEvaluator(tasks, tokenizer, ends)
        return self._by_tokenizer[key]

    def _entry(self, judged: JudgedModel, kind: Literal["base", "expert", "merge"], setting: str = "") -> Entry:
        outcomes = self.outcomes(judged)
        if self.harness is None:
            return Entry(judged.label, kind, outcomes, setting)
        tell = partial(self.model_host.options.progress, f"judging {judged.label} by lm-eval")
        tell(0, 1)
        scores = self.harness.scores(judged.model, self.tasks_of(judged).tokenizer, judged.label)
        tell(1, 1)
        return Entry(judged.label, kind, outcomes, setting, scores)


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
