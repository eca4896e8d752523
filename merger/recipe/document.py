"""A YAML file with the line of every key, so that a fault names its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from merger.checkpoint.near_paths import missing_path
from merger.errors import RecipeError, system_reason
from merger.recipe.foreign import foreign_fault
from merger.recipe.places import KeyPath as KeyPath
from merger.recipe.places import place_name

# A recipe is a page; these bounds only keep a hostile one from filling the memory through anchors.
MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 50


# --- documents ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """The content of a YAML file, and the line of each key."""

    label: str  # the file's name, for messages
    folder: Path  # where relative paths start
    value: dict[str, Any]
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def fault(self, path: KeyPath, message: str) -> str:
        """``file:line: place: message``, with the line of the nearest key that is in the file."""
        line = self.line(path)
        return _fault(f"{self.label}:{line}" if line else self.label, place_name(path, self.value), message)

    def line(self, path: KeyPath) -> int:
        """Returns the line of a key, or of its nearest parent in the file; 0 if there is none."""
        return next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 0)

    def changed(self, path: KeyPath, value: Any) -> Document:
        """Returns the document with one key set, as `--set` does; creates missing maps on the way."""
        return Document(self.label, self.folder, _set(self.value, path, value), self.lines)


def _fault(place: str, key: str, message: str) -> str:
    return f"{place}: {key}: {message}" if key else f"{place}: {message}"


def _set(node: Any, path: KeyPath, value: Any) -> Any:
    """Returns a copy of a tree with one value replaced; raises KeyError for an index outside a list."""
    if not path:
        return value
    key, tail = path[0], path[1:]
    if isinstance(node, list):
        if not str(key).isdecimal() or int(key) >= len(node):
            raise KeyError(key)
        return [_set(item, tail, value) if i == int(key) else item for i, item in enumerate(node)]
    entries = node if isinstance(node, dict) else {}
    for n in range(len(path), 1, -1):  # a key of the document may hold dots, as the name of an expert does
        dotted = ".".join(map(str, path[:n]))
        if dotted in entries:
            key, tail = dotted, path[n:]
            break
    return {**entries, str(key): _set(entries.get(str(key), {}), tail, value)}


_KEY = r"""(?:"[^"]*"|'[^']*'|[^."']+)"""


def key_path(text: str) -> KeyPath:
    """Splits ``rules.0.method`` or ``experts."v1.5".weight`` into keys; raises ValueError for text that is no path."""
    if not re.fullmatch(rf"{_KEY}(\.{_KEY})*", text):
        raise ValueError(text)
    return tuple(key.strip("\"'") for key in re.findall(_KEY, text))


# --- reading --------------------------------------------------------------------------------------


class RecipeLoader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does: ``no``, ``on`` and ``2026-01-01`` are text, ``true`` is a boolean."""


_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
_STR, _MERGE, _DATE, _VALUE = (f"tag:yaml.org,2002:{name}" for name in ("str", "merge", "timestamp", "value"))
RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (_NULL, _INT, _FLOAT, _MERGE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))

_SAME_IN_ALL_VERSIONS = re.compile(
    r"[-+]?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)"
    r"|0x[0-9a-fA-F]+"
    r"|[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_UNLIKE = (  # 010 is 8 to one and 10 to the other, 1:30 is 90 and text
    "YAML 1.1 and 1.2 read {text} differently; write a number in plain digits, or put it in quotes if it is text"
)


def read(path: Path, loader: type[yaml.SafeLoader] = RecipeLoader) -> Document:
    """Reads a YAML file: no tags that build objects, no duplicate keys, bounded anchors."""
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder, expected a recipe; merger inspect and merger verify look at models")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(f"{path}: is {size:,} bytes; a recipe is a page of YAML")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(missing_path(path, "file", Path.is_file)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = system_reason(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}") from None
    return parse(text, str(path), path.resolve().parent, loader)


def parse(text: str, label: str, folder: Path, loader: type[yaml.SafeLoader] = RecipeLoader) -> Document:
    """Parses YAML text; ``label`` names it in messages."""
    try:
        value, index = _construct(text, label, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        has_second_document = error.problem == "but found another document"
        problem = "holds several documents, expected one" if has_second_document else f"not valid YAML: {error.problem}"
        raise RecipeError(f"{label}:{mark.line + 1 if mark else 1}: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{label}: not valid YAML: {str(error).splitlines()[0]}") from None
    if index.faults:
        foreign = foreign_fault(label, index.lines) if loader is RecipeLoader else None
        faults = [_fault(f"{label}:{line}", place_name(path, {}), message) for line, path, message in index.faults]
        raise RecipeError(foreign or faults)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise RecipeError(f"{label}: expected keys and values (base:, experts:, ...), not {type(value).__name__}")
    return Document(label, folder, value, index.lines)


def value_of(text: str, label: str) -> Any:
    """Parses one YAML value of the command line; text that is not YAML, such as a regular expression, stays text."""
    try:
        value, index = _construct(text, label, RecipeLoader)
    except (yaml.YAMLError, ValueError):
        return text
    if index.faults:
        raise RecipeError([_fault(label, place_name(path, {}), message) for _, path, message in index.faults])
    return value


def _construct(text: str, label: str, loader_type: type[yaml.SafeLoader]) -> tuple[Any, _Index]:
    """Returns the value of one YAML document and the index of its nodes; None if the index holds faults."""
    loader, index = None, _Index(label)
    try:
        loader = loader_type(text)
        node = loader.get_single_node()
        if node is not None:
            index.visit(node, ())
        return (None if node is None or index.faults else loader.construct_document(node)), index
    except RecursionError:
        raise RecipeError(f"{label}: nested more than {MAX_DEPTH} levels deep") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Index:
    """The lines of a document's keys, and the faults that only its nodes show."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.lines: dict[KeyPath, int] = {}
        self.faults: list[tuple[int, KeyPath, str]] = []
        self.nodes = 0  # with anchors expanded

    def visit(self, node: yaml.Node, path: KeyPath) -> None:
        """Indexes the keys of a node and makes them text; raises RecipeError beyond MAX_NODES or MAX_DEPTH."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise RecipeError(f"{self.label}: its anchors expand to more than {MAX_NODES:,} values")
        if len(path) > MAX_DEPTH:
            raise RecipeError(f"{self.label}: nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, yaml.MappingNode):
            for i, (key, value) in enumerate(node.value):
                node.value[i] = (self._key(key, (*path, str(key.value))), value)
                self.visit(value, (*path, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                self.lines[(*path, i)] = value.start_mark.line + 1
                self.visit(value, (*path, i))
        elif node.tag in (_INT, _FLOAT) and not _SAME_IN_ALL_VERSIONS.fullmatch(node.value):
            self._fault(node, path, _UNLIKE.format(text=node.value))

    def _key(self, key: yaml.Node, path: KeyPath) -> yaml.Node:
        """Returns the key as text, as written; a repeated key, null or a boolean is a fault."""
        if path in self.lines and key.value != "<<":
            self._fault(key, path, "stands here a second time")
        self.lines.setdefault(path, key.start_mark.line + 1)
        if key.tag in (_NULL, _BOOL):
            self._fault(key, path, f"is null or a boolean to YAML; write it in quotes: {key.value!r}")
        if key.tag in (_INT, _FLOAT, _DATE, _VALUE):
            return yaml.ScalarNode(_STR, key.value, key.start_mark, key.end_mark)
        return key

    def _fault(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self.faults.append((node.start_mark.line + 1, path, message))
