"""The embedded demo: three tiny fine-tunes of one model, merged several ways and judged on every task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merger.checkpoint.files import make_folder, replace_bytes
from merger.demo import tasks as demo_tasks
from merger.engine.merge import merge
from merger.errors import RecipeError
from merger.options import RunOptions
from merger.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 0.5},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.7, "lambda": 0.5},
    "cabs": {"n": 85, "m": 256},
    "obim": {"density": "auto"},
}
"""The merges of the demo: method -> parameters."""

HELD_OUT = 100
"""Examples of each task that no model has seen."""


@dataclass(frozen=True)
class Score:
    """How often one model answers exactly right, by task."""

    model: str
    kind: str  # base, expert or merge
    accuracy: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Over all tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    @property
    def worst(self) -> float:
        """On the task it does worst."""
        return min(self.accuracy.values())


def prepare(folder: Path, *, force: bool = False) -> Path:
    """Writes models, calibration text, held-out examples and a recipe into ``folder``; returns the recipe.

    With ``force`` the folder may be that of an earlier demo: a file that it lacks is written, a file that was changed
    is refused, and every other file stays.
    """
    contents = dict(_contents())
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not force:
            raise RecipeError(f"{folder}: is there already; choose another folder, or replace it with force=True")
        existing = [name for name in contents if (folder / name).is_file()]
        if not existing:
            raise RecipeError(f"{folder}: holds something else than a demo; choose another folder")
        for name in existing:
            if (folder / name).read_bytes() != contents[name]:
                raise RecipeError(f"{folder / name}: is not as the demo wrote it; move it, or choose another folder")
    for name, content in contents.items():
        path = folder / name
        if not path.is_file():
            make_folder(path.parent)
            replace_bytes(path, content)
    return folder / "recipe.yaml"


def _contents() -> Iterator[tuple[str, bytes]]:
    """The files of a demo's folder by their names in it."""
    with as_file(files("merger.demo") / "models") as models:
        for path in sorted(path for path in models.rglob("*") if path.is_file()):
            yield f"models/{path.relative_to(models).as_posix()}", path.read_bytes()
    for task in demo_tasks.TASKS:
        lines = [json.dumps({"text": p + a}) for p, a in demo_tasks.examples(task, "calibration", 100)]
        yield f"data/{task}.jsonl", ("\n".join(lines) + "\n").encode()
        lines = [json.dumps({"prompt": p, "answer": a}) for p, a in demo_tasks.examples(task, "heldout", HELD_OUT)]
        yield f"held-out/{task}.jsonl", ("\n".join(lines) + "\n").encode()
    remark = "# Try `merger plan recipe.yaml`, then `merger run recipe.yaml`.\n"
    yield "recipe.yaml", (remark + _recipe("obim", "merged/obim")).encode()


def _recipe(method: str, output: str) -> str:
    tasks = list(demo_tasks.TASKS)
    fields: dict[str, Any] = {
        "base": "models/base",
        "experts": {task: f"models/{task}" for task in tasks},
        "method": method,
        "parameters": METHODS[method],
        "calibration": {"data": {task: f"data/{task}.jsonl" for task in tasks}, "samples": 100},
        "evaluation": {"data": {task: f"held-out/{task}.jsonl" for task in tasks}},
        "output": {"path": output},
    }
    return yaml.safe_dump(fields, sort_keys=False)


def demo(folder: Path, options: RunOptions = RunOptions(), *, force: bool = False) -> list[Score]:
    """Merges the demo's experts by every method of `METHODS` and scores all models on all tasks."""
    prepare(folder, force=force)
    held_out = {task: demo_tasks.examples(task, "heldout", HELD_OUT) for task in demo_tasks.TASKS}
    scores = []
    for name in ("base", *demo_tasks.TASKS):
        options.notice(f"scoring {name}")
        kind = "base" if name == "base" else "expert"
        scores.append(Score(name, kind, score(folder / "models" / name, held_out)))
    for method in METHODS:
        options.notice(f"merging by {method}")
        output = merge_folder(folder, method)
        recipe = Recipe.parse(_recipe(method, str(output.relative_to(folder))), folder)
        merge(recipe, options, force=force)
        scores.append(Score(method, "merge", score(output, held_out)))
    return scores


def merge_folder(folder: Path, method: str) -> Path:
    """Where the demo's merge by a method goes: not where its recipe merges to, so that this can be run as it stands."""
    return folder / "compared" / method


def score(model_path: Path, held_out: Mapping[str, Sequence[demo_tasks.Example]]) -> dict[str, float]:
    """The share of right answers of one checkpoint, by task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return {task: demo_tasks.accuracy(model, tokenizer, sample) for task, sample in held_out.items()}


def print_scores(scores: Sequence[Score], console: Console) -> None:
    """One table: what each expert can do, and what each merge can."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="right answers on held-out examples", title_justify="left")
    table.add_column("model")
    for task in (*demo_tasks.TASKS, "mean", "worst"):
        table.add_column(task, justify="right")
    best = max((score for score in scores if score.kind == "merge"), key=lambda score: score.worst)
    for i, score in enumerate(scores):
        last_of_kind = i + 1 < len(scores) and scores[i + 1].kind != score.kind
        cells = [f"{100 * value:.0f} %" for value in (*score.accuracy.values(), score.mean, score.worst)]
        name = score.model if score.kind != "expert" else f"expert in {score.model}"
        table.add_row(name, *cells, style="bold" if score is best else None, end_section=last_of_kind)
    console.print(table)
