"""A recipe's `rename`: other names for the tensors of an input."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from merger.errors import CheckpointError

_LIKENESS = 0.5
"""How near a name must be to a regular expression that matches nothing: 1 is the same text."""


class RenameError(CheckpointError):
    """A `rename` does not fit the names of an input; ``pattern`` is the entry that is wrong, where one is."""

    def __init__(self, label: str, pattern: str | None, reason: str) -> None:
        super().__init__(f"{label}: rename: {f'{pattern}: ' if pattern else ''}{reason}")
        self.pattern, self.reason = pattern, reason


def new_names(label: str, names: Iterable[str], rename: Mapping[str, str]) -> dict[str, str]:
    """By name of a tensor, the name that ``rename`` gives it: each entry is applied to what those before it made.

    An entry replaces every match of its regular expression by its template, as `re.sub` does. Raises RenameError for an
    entry that matches nothing, and for two tensors that get one name.
    """
    stored = list(names)
    renamed = dict(zip(stored, stored, strict=True))
    for pattern, template in rename.items():
        expression = re.compile(pattern)
        matches = [name for name, new in renamed.items() if expression.search(new)]
        if not matches:
            raise RenameError(label, pattern, f"matches no tensor; {_near_names(pattern, renamed.values())}")
        renamed |= {name: expression.sub(template, renamed[name]) for name in matches}
    owners: dict[str, str] = {}
    for name, new in renamed.items():
        if (first := owners.setdefault(new, name)) != name:
            raise RenameError(
                label, None, f"both {first} and {name} become {new}; make the regular expressions narrower"
            )
    return renamed


def check_rename(rename: dict[str, str]) -> dict[str, str]:
    """The entries, unchanged; ValueError for one that is no regular expression, or whose template does not fit it."""
    for pattern, template in rename.items():
        try:
            re.compile(pattern)
            re.compile(f"{pattern}|").sub(template, "")  # a template is only looked at where something matches
        except (re.error, IndexError) as error:
            raise ValueError(f"{pattern}: {template}: is no regular expression with its template: {error}") from None
    return rename


def _near_names(pattern: str, names: Iterable[str]) -> str:
    """A clause that offers modules whose names are like a regular expression, or else the first names."""
    modules: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        modules.update({".".join(parts[:end]): None for end in range(1, len(parts) + 1)})
    text = re.sub(r"\\(?=\W)|[\^$]", "", pattern)
    near = difflib.get_close_matches(text.rstrip("."), modules, n=3, cutoff=_LIKENESS)
    if near:
        return f"near names: {', '.join(near)}"
    return f"its names are like {', '.join(list(names)[:3])}"
