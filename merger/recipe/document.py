"""A YAML file with the place of every key, so that a fault can be told with its line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from merger.errors import RecipeError

KeyPath = tuple[str | int, ...]

# A recipe is a page; these bounds only keep a hostile one from filling the memory through anchors.
MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 50


@dataclass(frozen=True)
class Document:
    """What a YAML file says, and the line on which each key stands."""

    label: str  # the file's name, for messages
    folder: Path  # what relative paths are relative to
    value: dict[str, Any]
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def fault(self, path: KeyPath, message: str) -> str:
        """``file:line: key.path: message``, with the line of the nearest key that is in the file."""
        line, key = self.line(path), ".".join(map(str, path))
        where = f"{self.label}:{line}" if line else self.label
        return f"{where}: {key}: {message}" if key else f"{where}: {message}"

    def line(self, path: KeyPath) -> int:
        """The line of a key, or of the nearest key around it that is in the file; 0 where none is."""
        return next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 0)

    def changed(self, path: KeyPath, value: Any) -> Document:
        """The same document with one key set, as `--set` does; missing maps on the way are made."""
        return Document(self.label, self.folder, _set(self.value, path, value), self.lines)


def _set(node: Any, path: KeyPath, value: Any) -> Any:
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(node, list):
        if not isinstance(key, int) or key >= len(node):
            raise KeyError(key)
        return [_set(each, rest, value) if i == key else each for i, each in enumerate(node)]
    held = node if isinstance(node, dict) else {}
    return {**held, str(key): _set(held.get(str(key), {}), rest, value)}


def read(path: Path) -> Document:
    """Reads a YAML file safely: no tags that build objects, no duplicate keys, bounded anchors."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(f"{path}: is {size:,} bytes; a recipe is a page of YAML")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}") from None
    return parse(text, str(path), path.resolve().parent)


def parse(text: str, label: str, folder: Path) -> Document:
    """Parses YAML text; ``label`` names it in messages."""
    try:
        value, lines = _construct(text, label)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        several = error.problem == "but found another document"
        problem = "holds several documents, expected one" if several else f"not valid YAML: {error.problem}"
        raise RecipeError(f"{label}:{mark.line + 1 if mark else 1}: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{label}: not valid YAML: {str(error).splitlines()[0]}") from None
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise RecipeError(f"{label}: expected keys and values (base:, experts:, ...), not {type(value).__name__}")
    return Document(label, folder, value, lines)


def value_of(text: str) -> Any:
    """One YAML value written on the command line; what is no YAML, such as a regular expression, is text."""
    try:
        return _construct(text, "--set")[0]
    except (yaml.YAMLError, ValueError):
        return text


def _construct(text: str, label: str) -> tuple[Any, dict[KeyPath, int]]:
    """The value of one YAML document and the line of each of its keys."""
    lines: dict[KeyPath, int] = {}
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _walk(node, (), lines, label, [0])
        return (None if node is None else loader.construct_document(node)), lines
    except RecursionError:
        raise RecipeError(f"{label}: nested more than {MAX_DEPTH} levels deep") from None
    finally:
        if loader is not None:
            loader.dispose()


def _walk(node: yaml.Node | None, path: KeyPath, lines: dict[KeyPath, int], label: str, seen: list[int]) -> None:
    """Notes each key's line, and counts what the anchors expand to."""
    seen[0] += 1
    if seen[0] > MAX_NODES:
        raise RecipeError(f"{label}: its anchors expand to more than {MAX_NODES:,} values")
    if len(path) > MAX_DEPTH:
        raise RecipeError(f"{label}: nested more than {MAX_DEPTH} levels deep")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            line = key.start_mark.line + 1
            if here in lines and key.value != "<<":
                raise RecipeError(f"{label}:{line}: {'.'.join(map(str, here))}: stands here a second time")
            lines[here] = line
            _walk(value, here, lines, label, seen)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*path, i)] = value.start_mark.line + 1
            _walk(value, (*path, i), lines, label, seen)


def key_path(text: str) -> KeyPath:
    """``rules.0.method`` as the keys it goes through."""
    return tuple(int(part) if part.isdigit() else part for part in text.split("."))
