"""The demo's models with held-out examples beside them, as recipes name them."""

import json

import pytest
import yaml

from merger.demo import demo
from merger.demo import tasks as demo_tasks
from merger.recipe.recipe import Recipe

TASKS = tuple(demo_tasks.TASKS)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """Models, calibration text, and NAME.answers.jsonl with 40 held-out prompts and answers of each task."""
    folder = tmp_path_factory.mktemp("evaluation") / "demo"
    demo.prepare(folder)
    for task in TASKS:
        lines = [{"prompt": p, "answer": a} for p, a in demo_tasks.examples(task, "heldout", 40)]
        write(folder / "data" / f"{task}.answers.jsonl", lines)
        write(folder / "data" / f"{task}.texts.jsonl", [{"text": line["prompt"] + line["answer"]} for line in lines])
    return folder


def write(path, records):
    """Puts records into a file of JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def text_of(folder, kind="answers", tasks=TASKS, **changes):
    """A recipe for the demo's models, with data of a kind to judge by."""
    data = folder / "data"
    content = {
        "base": str(folder / "models" / "base"),
        "experts": {task: str(folder / "models" / task) for task in tasks},
        "method": "ties",
        "calibration": {"data": {task: str(data / f"{task}.jsonl") for task in tasks}, "samples": 8, "max_tokens": 32},
        "evaluation": {
            "data": {task: str(data / f"{task}.{kind}.jsonl") for task in tasks},
            "samples": 10,
            "dtype": "float32",
        },
        "output": {"path": "merged"},
        **changes,
    }
    return {key: value for key, value in content.items() if value is not None}


def recipe_of(folder, kind="answers", **changes):
    """The same, parsed."""
    return Recipe.parse(text_of(folder, kind, **changes), folder)


def file_of(path, content):
    """The same, as a file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
