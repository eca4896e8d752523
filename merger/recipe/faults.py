"""Translates pydantic's errors into faults: the key path, the value, and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

from pydantic import ValidationError

from merger.errors import nearest
from merger.pipeline.parameters import WORDS
from merger.recipe.document import KeyPath

_TAGS = {
    "one",
    "by_depth",
    "by_expert",
    *WORDS,
    "pinned",
    "named",
    "listed",
    "location",
    "source",
    "list",
    "scheme",
    "average",
}
_MAPPING, _TEXT, _WHOLE, _SWITCH = "keys and values", "text", "a whole number", "true or false"
_EXPECTED = {  # by pydantic's name of the error
    "dict_type": _MAPPING, "model_type": _MAPPING, "list_type": "a list", "string_type": _TEXT,
    "string_too_short": _TEXT, "int_type": _WHOLE, "int_from_float": _WHOLE, "int_parsing": _WHOLE,
    "bool_type": _SWITCH, "bool_parsing": _SWITCH,
}  # fmt: skip
_FORMS = {"one": "a number", "by_depth": "a list of them over depth", "by_expert": "a map by expert"}
_ALIASES = {
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
}
"""The names that other tools have for dtypes."""
_LIMITS = {
    "less_than_equal": ("le", "at most"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "greater_than": ("gt", "more than"),
}


def translate_errors(
    error: ValidationError,
    keys: Callable[[KeyPath], Iterable[str]],
    value: Any,
    nested_keys: Iterable[KeyPath] = (),
) -> Iterator[tuple[KeyPath, str]]:
    """Yields each error's key path in the validated ``value``, and one sentence.

    ``keys`` returns the valid keys at a path. ``nested_keys`` are keys of sections, which are offered for an unknown
    key beside these sections.
    """
    sentences: dict[KeyPath, str] = {}
    unquoted: set[KeyPath] = set()
    limited: set[KeyPath] = set()
    for detail in error.errors(include_url=False):
        path = _path(detail["loc"], value, last_is_a_key=detail["type"] == "extra_forbidden")
        if path in limited:  # the value has the type of a branch of a union, beyond its limit
            continue
        if detail["type"] in _LIMITS:
            limited.add(path)
        sentence = _sentence(dict(detail), path, keys)
        if detail["type"] == "extra_forbidden" and len(path) == 1:
            sentence = _nested_suggestion(str(path[0]), keys(()), nested_keys) or sentence
        prefix = sentences.get(path, "").partition(", expected ")[0]
        if prefix and sentence.startswith(f"{prefix}, expected "):  # the branches of a union
            sentence = sentence.replace(f"{prefix}, expected", f"{sentences[path]} or", 1)
        sentences[path] = sentence
        if detail["type"] == "string_type" and isinstance(detail["input"], bool | int | float):
            unquoted.add(path)
    for path, sentence in sentences.items():
        yield path, f"{sentence}; put it in quotes" if path in unquoted else sentence


def _path(parts: KeyPath, value: Any, *, last_is_a_key: bool) -> KeyPath:
    """Removes tags from pydantic's path: a tag names the branch of a union and is no key of ``value``."""
    path: list[str | int] = []
    for i, part in enumerate(parts):
        is_key = isinstance(value, Mapping) and part in value
        if is_key or not _is_tag(part) or (last_is_a_key and i == len(parts) - 1):
            path.append(part)
        if is_key or (isinstance(value, list) and part in range(len(value))):
            value = value[part]
    return tuple(path)


def _is_tag(part: Any) -> bool:
    """Whether a part of a path is pydantic's name of a union's branch, such as dict[str,str]."""
    types = ("str", "int", "constrained-int", "function-before")
    return isinstance(part, str) and (part in _TAGS or "[" in part or part in types)


def _sentence(detail: dict[str, Any], path: KeyPath, keys: Callable[[KeyPath], Iterable[str]]) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    state = "is empty" if value in (None, "") else f"is {_excerpt(value)}"
    if kind == "extra_forbidden":
        return f"unknown key; {nearest(str(path[-1]), keys(path[:-1]))}"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        expected = [word.strip("' ") for word in re.split(r", | or ", context["expected"])]
        return f"{state}, expected {context['expected']}{_suggestion(value, expected)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        return f"{state}, expected at least {context['min_length']} of them"
    if kind in _LIMITS:
        limit, words = _LIMITS[kind]
        return f"{state}, expected {words} {context[limit]}"
    if kind == "union_tag_invalid":
        forms = [_FORMS.get(tag.strip("'"), tag) for tag in context["expected_tags"].split(", ")]
        return f"{state}, expected {', '.join(forms[:-1])} or {forms[-1]}"
    if path[-1:] == ("shard_size",):
        return f"{state}, expected a size such as 5GB, 500MiB or a number of bytes"
    return f"{state}, expected {_EXPECTED[kind]}" if kind in _EXPECTED else f"{state}: {detail['msg']}"


def _nested_suggestion(name: str, valid_keys: Iterable[str], nested_keys: Iterable[KeyPath]) -> str | None:
    """The fault of an unknown key that is one of a section's; None where a key beside it is as near."""
    paths = list(nested_keys)
    if nearest(name, valid_keys).startswith("did") or not paths:
        return None
    last_keys = {str(path[-1]) for path in paths}
    key = name if name in last_keys else next(iter(get_close_matches(name, sorted(last_keys), n=1)), None)
    places = [".".join(map(str, path)) for path in paths if path[-1] == key]
    return f"unknown key; did you mean {' or '.join(map(repr, places))}?" if places else None


def _excerpt(value: Any) -> str:
    """Returns a value as a recipe writes it, cut to 80 characters."""
    text = repr(float(value) if isinstance(value, Fraction) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggestion(value: Any, expected: list[str]) -> str:
    suggestion = nearest(_ALIASES.get(str(value), str(value)), expected)
    return f"; {suggestion}" if suggestion.startswith("did") else ""
