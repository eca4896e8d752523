"""Held-out examples: reading from files or the Hub, selection by content, overlap with calibration text, hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merger.calibration.datasets import Record, records
from merger.errors import CheckpointError, RecipeError
from merger.recipe.recipe import Recipe
from merger.recipe.sections import TextSource, text_sources

Kind = Literal["text", "answer", "choices"]
Data = Mapping[str, str | TextSource | Sequence[str | TextSource]]
"""Where the examples of each task are."""
PlacedExample = tuple[str, Kind, "Example"]
"""The place of a record, and its example."""


@dataclass(frozen=True)
class Example:
    """A text (no prompt, one reply), a prompt with its answer, or a prompt with choices (``correct``: an index)."""

    prompt: str
    replies: tuple[str, ...]
    correct: int = 0

    @property
    def content(self) -> str:
        """Prompt, replies and correct index as one text, which identifies the example."""
        return "\x1f".join((self.prompt, *self.replies, str(self.correct)))


@dataclass(frozen=True)
class Task:
    """Held-out examples of one kind, on which models are evaluated."""

    name: str
    kind: Kind
    examples: tuple[Example, ...]

    @property
    def sha256(self) -> str:
        """The SHA-256 of the examples; their order does not matter."""
        digests = sorted(
            hashlib.sha256(example.content.encode(errors="surrogatepass")).hexdigest() for example in self.examples
        )
        return hashlib.sha256("\n".join([self.kind, *digests]).encode()).hexdigest()

    @property
    def measure(self) -> str:
        """``loss`` (per token, lower is better) or ``accuracy`` (share of correct answers)."""
        return "loss" if self.kind == "text" else "accuracy"


@dataclass(frozen=True)
class Split:
    """The tasks twice, with no example in common: for a search to choose by, and for the report on what it chose."""

    search: tuple[Task, ...]
    report: tuple[Task, ...]


def load(data: Data, folder: Path, samples: int) -> tuple[Task, ...]:
    """Up to ``samples`` examples of each task; CheckpointError for data that cannot be used.

    Files are JSON Lines, JSON, Parquet or plain text, relative to ``folder``, or else datasets of the Hub.
    """
    return tuple(_task(name, read, samples) for name, read in _read_tasks(data, folder))


def split(data: Data, folder: Path, report: int, search: int) -> Split:
    """``report`` examples of each task for the report, and ``search`` others; CheckpointError where there are fewer.

    Neither choice depends on the other's size: one is from the beginning of the examples' order, one from its end.
    """
    all_tasks = [_task(name, read, None) for name, read in _read_tasks(data, folder)]
    for task in all_tasks:
        if len(task.examples) < report + search:
            files = ", ".join(source.file for source in text_sources(data[task.name]))
            raise CheckpointError(
                f"evaluation.data.{task.name}: {files} has {len(task.examples)} different examples, but the "
                f"search takes {search} and the report {report} others; lower search.samples or evaluation.samples"
            )
    return Split(
        search=tuple(Task(task.name, task.kind, task.examples[-search:]) for task in all_tasks),
        report=tuple(Task(task.name, task.kind, task.examples[:report]) for task in all_tasks),
    )


def _read_tasks(data: Data, folder: Path) -> Iterator[tuple[str, list[PlacedExample]]]:
    for name, value in data.items():
        yield name, [read for source in text_sources(value) for read in _read(source, folder)]


def _read(source: TextSource, folder: Path) -> list[PlacedExample]:
    """The examples of one source: all of them, or as many as it has a count of, chosen by content."""
    read = [(record.place, *_example(record)) for record in records(source, folder)]
    if not read:
        raise CheckpointError(f"{source.file}: holds no example")
    return read if source.samples is None else _select_examples(read, source.samples)


def _task(name: str, read: Sequence[PlacedExample], samples: int | None) -> Task:
    first, kind, _ = read[0]
    for place, example_kind, _ in read:
        if example_kind != kind:
            raise CheckpointError(f"{place}: is {example_kind}, but {first} {kind}; make tasks of each")
    return Task(name, kind, tuple(example for *_, example in _select_examples(read, samples)))


def _select_examples(read: Sequence[PlacedExample], samples: int | None) -> list[PlacedExample]:
    """The first ``samples`` different examples in the order of their hashes, or all of them."""
    by_content = {example.content: (place, kind, example) for place, kind, example in read}
    return [by_content[content] for content in sorted(by_content, key=_rank)[:samples]]


def _rank(content: str) -> bytes:
    """The sort key that selects examples; it does not depend on their order or repetition in a file."""
    return hashlib.sha256(f"evaluation\x1f{content}".encode(errors="surrogatepass")).digest()


def _example(record: Record) -> tuple[Kind, Example]:
    """The example of a record {text}, {prompt, answer} or {prompt, choices, answer}; else CheckpointError."""
    fields = record.fields
    match fields:
        case {"prompt": str(prompt), "choices": [_, _, *_] as choices, "answer": answer}:
            return "choices", Example(prompt, tuple(map(str, choices)), _correct_choice(record.place, choices, answer))
        case {"prompt": str(prompt), "answer": str(answer)} if "choices" not in fields and answer.strip():
            return "answer", Example(prompt, (answer,))
        case {"text": str(text)} if text and "prompt" not in fields:
            return "text", Example("", (text,))
    field_names = ", ".join(sorted(map(str, fields))) or "no field at all"
    raise CheckpointError(
        f"{record.place}: expected text, or prompt and answer, or prompt, choices (2 or more) and answer; "
        f"found {field_names}"
    )


def _correct_choice(place: str, choices: Sequence[Any], answer: Any) -> int:
    """The index of the correct choice; a record gives the index from 0, the choice's text, or the index as text."""
    if _is_index(answer, choices):
        return int(answer)
    if answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and answer.isdecimal() and _is_index(int(answer), choices):
        return int(answer)
    raise CheckpointError(f"{place}: answer is {answer!r}, expected one of the choices, or its number from 0")


def _is_index(answer: Any, choices: Sequence[Any]) -> bool:
    return isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)


# --- apart from calibration -----------------------------------------------------------------------


def check_apart(recipe: Recipe, tasks: Iterable[Task]) -> None:
    """Raises RecipeError if the text of an example is also in the recipe's calibration data."""
    calibration = recipe.calibration
    if calibration is None or calibration.data is None:
        return
    sources = {
        (source.file, *source.fields.items()): source
        for expert in recipe.experts
        for source in calibration.sources(expert)
    }
    calibration_files = {
        text: sources[key].file for key in sorted(sources) for text in _texts(sources[key], recipe.folder)
    }
    faults = []
    for task in tasks:
        overlapping_files = [
            calibration_files[text] for example in task.examples if (text := _text(example)) in calibration_files
        ]
        if overlapping_files:
            faults.append(
                f"evaluation.data.{task.name}: {len(overlapping_files)} of {len(task.examples)} examples are "
                f"calibration text too ({', '.join(sorted(set(overlapping_files)))}); "
                f"hold others out, or let them in with allow_calibration_text=True"
            )
    if faults:
        raise RecipeError(faults)


def _texts(source: TextSource, folder: Path) -> Iterator[str]:
    """The text or prompt of each record, stripped; calibration and evaluation texts are compared in this form."""
    for record in records(source, folder):
        text = record.fields.get("text") or record.fields.get("prompt")
        if isinstance(text, str) and text.strip():
            yield text.strip()


def _text(example: Example) -> str:
    return (example.prompt or example.replies[0]).strip()
