"""Models of one family before the same tasks: the base, the experts, and merges in memory or in a folder."""

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
from merger.evaluation.measures import Judge, Outcome, ends_of, prepare
from merger.evaluation.model_host import Bench
from merger.evaluation.scores import Entry
from merger.evaluation.tasks import Task
from merger.planning.planner import open_models
from merger.recipe.recipe import Recipe


class Panel:
    """Judges the models of a family; the tasks are tokens of the base's tokenizer, which all models are given."""

    def __init__(
        self, bench: Bench, family: Recipe, tasks: Sequence[Task], max_tokens: int, harness: Harness | None = None
    ) -> None:
        self.bench, self.family, self.harness = bench, family, harness
        with _open(bench, family.base.model, family.base.adapter, "base", family.folder) as base:
            tokenizer = load_tokenizer(
                tokenizer_folder(base), "base", trust_remote_code=bench.options.trust_remote_code
            )
            with checkpoint_faults("base: its tokenizer cannot read the tasks"):
                limit = min(max_tokens, tokenizer.model_max_length, _positions(base) or max_tokens)
                ends = ends_of(base.directory, tokenizer)
                prepared = tuple(prepare(task, tokenizer, limit) for task in tasks)
            self.dtype = str(bench.dtype_for(base)).removeprefix("torch.")
        self.judge = Judge(prepared, tokenizer, ends)

    def references(self) -> Iterator[Entry]:
        """What the base does, then what the experts do, in the recipe's order."""
        for label, model in self.models():
            yield self._entry(label, kind_of(label), model)

    def models(self) -> Iterator[tuple[str, Any]]:
        """The base and the experts as transformers models, one after the other."""
        models = open_models(self.family, offline=self.bench.options.offline, headers_only=False)
        try:
            for label, model in models.items():
                yield label, self.bench.model_of(model)
        finally:
            for model in models.values():
                model.close()

    def merge(self, label: str, subject: Recipe | Path, setting: str = "") -> Entry:
        """A merge: made in memory of a recipe, or read from a folder."""
        if isinstance(subject, Recipe):
            return self._entry(label, "merge", self.bench.merged(subject)[0], setting)
        with _open(self.bench, str(subject), None, label, Path()) as checkpoint:
            return self._entry(label, "merge", self.bench.model_of(checkpoint), setting)

    def outcomes(self, model: Any, label: str) -> dict[str, Outcome]:
        """What a model does, told of under its name."""
        with checkpoint_faults(f"{label}: the model cannot be judged by text"):
            return self.judge.outcomes(model, partial(self.bench.options.progress, f"judging {label}"))

    def _entry(self, label: str, kind: Literal["base", "expert", "merge"], model: Any, setting: str = "") -> Entry:
        outcomes = self.outcomes(model, label)
        if self.harness is None:
            return Entry(label, kind, outcomes, setting)
        tell = partial(self.bench.options.progress, f"judging {label} by lm-eval")
        tell(0, 1)
        scores = self.harness.scores(model, self.judge.tokenizer, label)
        tell(1, 1)
        return Entry(label, kind, outcomes, setting, scores)


def kind_of(label: str) -> Literal["base", "expert"]:
    """What a model of a family is, by its name in the recipe."""
    return "base" if label == "base" else "expert"


def _open(bench: Bench, model: str, adapter: str | None, label: str, folder: Path) -> Checkpoint:
    return open_checkpoint(model, adapter, label=label, folder=folder, offline=bench.options.offline)


def _positions(model: Checkpoint) -> int | None:
    """How many tokens a model takes at once, if its config says so."""
    config = text_config(model.config)
    given = config.get("max_position_embeddings") or config.get("n_positions")
    return given if isinstance(given, int) else None
