"""The embedded demo: three tiny fine-tunes of one model, merged several ways and judged on every task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merger.checkpoint.files import check_replaceable
from merger.demo import tasks as demo_tasks
from merger.demo.folder import HELD_OUT, prepare, recipe_text
from merger.demo.scores import Score, Share, percent, score
from merger.engine.merge import merge
from merger.options import RunOptions
from merger.recipe.recipe import Recipe

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.3},
    "wudi_svc": {},
    "obim": {"density": "auto"},
    "regmean": {},
    "featcal": {},
}
"""The merges of the demo: method -> parameters. ``linear`` is the plain average."""

PAGE = "demo.html"
"""The file of a demo's folder with its pictures."""


@dataclass(frozen=True)
class Sample:
    """The first held-out prompt of a task, with its right answer and what three models reply."""

    prompt: str
    answer: str
    base: str
    average: str
    best: str


@dataclass(frozen=True)
class Demonstration:
    """The scores of base, experts and merges, and a sample of each task."""

    scores: tuple[Score, ...]
    examples: tuple[demo_tasks.Example, ...]  # the first held-out one of each task

    @property
    def best(self) -> Score:
        """The merge with the most right answers."""
        return max((score for score in self.scores if score.kind == "merge"), key=lambda score: score.total.value)

    def score(self, model: str) -> Score:
        """The score of one model."""
        return next(score for score in self.scores if score.model == model)

    @property
    def samples(self) -> list[Sample]:
        """One sample of each task: the first held-out example, whatever the models make of it."""
        base, average, best = (model.replies for model in (self.score("base"), self.score("linear"), self.best))
        return [
            Sample(prompt, answer, base[task], average[task], best[task])
            for task, (prompt, answer) in zip(demo_tasks.TASKS, self.examples, strict=True)
        ]

    def findings(self) -> list[str]:
        """What the figures say, in a sentence each."""
        base, average, obim, wudi_svc = (self.score(model).total for model in ("base", "linear", "obim", "wudi_svc"))
        return [
            f"{self.best.model} answers {percent(self.best.total)} of the prompts right, the plain average (linear) "
            f"{percent(average)}, the base {percent(base)}.",
            f"On models this tiny OBIM is {_relation(obim, average)} the average, "
            f"wudi_svc {_relation(wudi_svc, average)} it.",
        ]


def _relation(share: Share, mark: Share) -> str:
    """Where a share is by its interval: ahead of the mark, behind it, or neither."""
    return "ahead of" if share.low > mark.high else "behind" if share.high < mark.low else "neither ahead of nor behind"


def demo(folder: Path, options: RunOptions = RunOptions(), *, force: bool = False) -> Demonstration:
    """Merges the demo's experts by every method of `METHODS` and scores all models on all tasks.

    Raises RecipeError, before anything is written, if that would replace a file that no demo wrote.
    """
    if folder.is_dir():
        check_replaceable(folder / PAGE)
    prepare(folder, force=force)
    held_out = {task: demo_tasks.examples(task, "heldout", HELD_OUT) for task in demo_tasks.TASKS}
    scores = []
    for name in ("base", *demo_tasks.TASKS):
        options.notice(f"scoring {name}")
        kind = "base" if name == "base" else "expert"
        scores.append(score(name, kind, folder / "models" / name, held_out))
    for method, parameters in METHODS.items():
        options.notice(f"merging by {method}")
        output = merge_folder(folder, method)
        recipe = Recipe.parse(recipe_text(method, parameters, str(output.relative_to(folder))), folder)
        merge(recipe, options, force=force)
        scores.append(score(method, "merge", output, held_out))
    return Demonstration(tuple(scores), tuple(examples[0] for examples in held_out.values()))


def merge_folder(folder: Path, method: str) -> Path:
    """Where the demo's merge by a method goes: not where its recipe merges to, so that this can be run as it stands."""
    return folder / "compared" / method
