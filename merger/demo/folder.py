"""The demo's folder: the files that a demo writes into it, and which of the files there an earlier demo wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from importlib.resources import as_file, files
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from merger.checkpoint.files import json_bytes, make_folder, replace_bytes
from merger.demo import tasks as demo_tasks
from merger.errors import RecipeError

HELD_OUT = 100
"""Examples of each task that no model has seen."""

MANIFEST = "demo.json"
"""The file that names the other files of a demo with their SHA-256."""

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "recipe.yaml": ("obim", {"density": "auto"}),
    "featcal.yaml": ("featcal", {}),
}
"""The recipes of a demo's folder: file -> method and its parameters."""

EARLIER = frozenset(
    {
        "9ff6aa36efd431ee2c3a7ed4c9764e2cf797f5186f30578f36cdfba6a9044a84",  # recipe.yaml
        "807299fab4933a14d981206b3f79718e4e2838c9cbc70a58435cae08fda4892b",  # recipe.yaml with held-out examples
        "42b4bd6d27af58f3bb03f6b50d175a84d8323c89163444aa420007f81139b446",  # models/base
        "fd338d3ad1ee6a0eaf201ec205c5fafcb46a92d8d068439d1496a6784b7f0ce2",  # models/upper
        "d0a8099b81d58d19702da204b3230388467e86c84e1b31f292d537f6f8031425",  # models/shift
        "41cc767fd158f9c2ed71a481e038170828b473886a9e995104a2c866e07df191",  # models/double
    }
)
"""SHA-256 of the files that demos without a manifest wrote otherwise than today's."""


def prepare(folder: Path, *, force: bool = False) -> Path:
    """Writes models, calibration text, held-out examples and recipes into ``folder``; returns the recipe of OBIM.

    With ``force`` the folder may be that of an earlier demo: files that the earlier demo wrote are replaced, and every
    other file stays. Raises RecipeError, before anything is written, if a file was changed since.
    """
    contents = dict(_contents())
    _check_replaceable(folder, contents, force=force)
    for name, content in contents.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            make_folder(path.parent)
            replace_bytes(path, content)
    return folder / "recipe.yaml"


def usable_folder(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that `prepare` can write with ``force``."""
    contents = dict(_contents())
    for number in count(1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(RecipeError):
            _check_replaceable(candidate, contents, force=True)
            return candidate
    raise AssertionError("count() has no end")


def recipe_text(method: str, parameters: Mapping[str, Any], output: str) -> str:
    """The recipe that merges the demo's experts by a method."""
    tasks = list(demo_tasks.TASKS)
    fields: dict[str, Any] = {
        "base": "models/base",
        "experts": {task: f"models/{task}" for task in tasks},
        "method": method,
        "parameters": dict(parameters),
        "calibration": {"data": {task: f"data/{task}.jsonl" for task in tasks}, "samples": 100},
        "evaluation": {"data": {task: f"held-out/{task}.jsonl" for task in tasks}},
        "output": {"path": output},
    }
    return yaml.safe_dump(fields, sort_keys=False)


def _contents() -> Iterator[tuple[str, bytes]]:
    """The files of a demo's folder by their names in it; the manifest is the last."""
    contents = {**_models(), **_examples()}
    for file, (method, parameters) in RECIPES.items():
        remark = f"# Try `merger plan {file}`, then `merger run {file}`.\n"
        contents[file] = (remark + recipe_text(method, parameters, f"merged/{method}")).encode()
    yield from contents.items()
    hashes = {name: sha256(content).hexdigest() for name, content in contents.items()}
    yield MANIFEST, json_bytes({"sha256": hashes})


def _models() -> dict[str, bytes]:
    """The files of base and experts."""
    with as_file(files("merger.demo") / "models") as models:
        paths = sorted(path for path in models.rglob("*") if path.is_file())
        return {f"models/{path.relative_to(models).as_posix()}": path.read_bytes() for path in paths}


def _examples() -> dict[str, bytes]:
    """The calibration text and the held-out examples of every task, as JSON Lines."""
    contents = {}
    for task in demo_tasks.TASKS:
        texts = [json.dumps({"text": p + a}) for p, a in demo_tasks.examples(task, "calibration", 100)]
        pairs = [json.dumps({"prompt": p, "answer": a}) for p, a in demo_tasks.examples(task, "heldout", HELD_OUT)]
        contents[f"data/{task}.jsonl"] = ("\n".join(texts) + "\n").encode()
        contents[f"held-out/{task}.jsonl"] = ("\n".join(pairs) + "\n").encode()
    return contents


def _check_replaceable(folder: Path, contents: Mapping[str, bytes], *, force: bool) -> None:
    """RecipeError if writing the contents into the folder would replace a file that no demo wrote."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not force:
        raise RecipeError(f"{folder}: is there already; choose another folder, or replace it with force=True")
    existing = [name for name in contents if (folder / name).is_file()]
    if not existing:
        raise RecipeError(f"{folder}: holds something else than a demo; choose another folder")
    hashes = _manifest_hashes(folder / MANIFEST)
    if hashes:
        existing.remove(MANIFEST)
    changed = [
        str(folder / name)
        for name in existing
        if not _is_demo_file((folder / name).read_bytes(), contents[name], hashes.get(name))
    ]
    if changed:
        are, wrote, move = ("is", "it", "it") if len(changed) == 1 else ("are", "them", "them")
        raise RecipeError(
            f"{', '.join(changed)}: {are} not as the demo wrote {wrote}; move {move}, or choose another folder"
        )


def _is_demo_file(content: bytes, todays: bytes, recorded_hash: str | None) -> bool:
    return content == todays or sha256(content).hexdigest() in {recorded_hash, *EARLIER}


def _manifest_hashes(path: Path) -> dict[str, str]:
    """SHA-256 by name of the files that the demo of a manifest wrote; none if there is no readable manifest."""
    try:
        return dict(json.loads(path.read_bytes())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
