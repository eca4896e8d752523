"""Records of text: JSON Lines, JSON, plain text and Parquet files, and datasets of the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from merger.errors import CheckpointError, system_reason
from merger.recipe.sections import Role, TextSource, is_dataset

TARGETS = ("completion", "response", "answer", "output", "target")
"""The columns of which the first one that a record has is the reply to its prompt."""
HUB_RECORDS = 10_000  # of a Hub dataset only its first ones are looked at: some hold more text than a disk


@dataclass(frozen=True)
class Record:
    """One record, and its place for messages."""

    place: str
    fields: dict[str, Any]


_SAME_ROLE = (("messages", "prompt", "text"), TARGETS, ("choices",))


def records(source: TextSource, folder: Path) -> Iterator[Record]:
    """The records of a file, relative to ``folder``, or else of a Hub dataset NAME, NAME:SPLIT or NAME:CONFIG:SPLIT.

    Columns have the names that the source maps them to.
    """
    stored = _read_source(source.file, folder)
    yield from (_map_fields(record, source.fields) for record in stored) if source.fields else stored


def _map_fields(record: Record, fields: Mapping[Role, str]) -> Record:
    """The record with its columns under the names of their roles; a mapped role hides columns of the same role."""
    missing = [column for column in fields.values() if column not in record.fields]
    if missing:
        columns = ", ".join(sorted(map(str, record.fields))) or "no field at all"
        raise CheckpointError(f"{record.place}: has no field {missing[0]}, which `fields` names; found {columns}")
    replaced_names = {name for names in _SAME_ROLE if not fields.keys().isdisjoint(names) for name in names}
    unmapped_fields = {name: value for name, value in record.fields.items() if name not in replaced_names}
    return Record(record.place, {**unmapped_fields, **{role: record.fields[column] for role, column in fields.items()}})


def _read_source(source: str, folder: Path) -> Iterator[Record]:
    path = folder / Path(source).expanduser()
    if path.is_file():
        try:
            yield from _READERS.get(path.suffix.lower(), _read_paragraphs)(path)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start:,})") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {system_reason(error)}") from None
    elif not is_dataset(source):
        raise CheckpointError(f"{path}: there is no such file of text")
    else:
        yield from _read_hub(source)


def _read_json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _record(_parse_json(line, f"{path}:{number}"), f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Record]:
    """A list of records, or an object with one list in it."""
    content = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise CheckpointError(f"{path}: expected a list of records, or an object that holds one list of them")
    for number, value in enumerate(lists[0], 1):
        yield _record(value, f"{path}: record {number}")


def _read_paragraphs(path: Path) -> Iterator[Record]:
    """Plain text: one sample per paragraph; blank lines part them."""
    for number, text in enumerate(re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig")), 1):
        if text.strip():
            yield Record(f"{path}: paragraph {number}", {"text": text.strip()})


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise CheckpointError(f"{path}: Parquet needs pyarrow: pip install 'merger[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield Record(f"{path}: row {number}", row)
    except ArrowException as error:
        raise CheckpointError(f"{path}: is not a Parquet file: {error}") from None


def _read_hub(source: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise CheckpointError(
            f"{source}: is no file, and a dataset of the Hub needs datasets: pip install 'merger[data]'"
        ) from None
    name, *qualifiers = source.split(":")
    split = qualifiers[-1] if qualifiers else "train"
    try:
        rows = datasets.load_dataset(name, *qualifiers[:-1], split=split, streaming=True)
        for number, row in enumerate(islice(rows, HUB_RECORDS), 1):
            yield Record(f"{source}: row {number}", row)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CheckpointError(f"{source}: is no file, and not a dataset that can be loaded: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_paragraphs,
    ".md": _read_paragraphs,
}


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place}: is not valid JSON: {error}") from None


def _record(value: Any, place: str) -> Record:
    """A record; a bare string is its text."""
    if isinstance(value, str):
        return Record(place, {"text": value})
    if not isinstance(value, dict):
        raise CheckpointError(f"{place}: expected an object or a string, found a {type(value).__name__}")
    return Record(place, value)
