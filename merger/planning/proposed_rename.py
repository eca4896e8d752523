"""The `rename` that would make an expert's tensors those of the base, found by the ends of their names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from merger.checkpoint.renaming import new_names
from merger.checkpoint.tensor_info import Info
from merger.errors import CheckpointError

_SHORTEST = 2
"""The fewest parts of two names' common end: `weight` alone says nothing, `lm_head.weight` does."""


def proposed_rename(tensors: Mapping[str, Info], base: Mapping[str, Info]) -> dict[str, str]:
    """Returns entries for `rename` after which most tensors of an expert, or of the base, are in both.

    Empty where no prefixes make them so.
    """
    rename: dict[str, str] = {}
    by_prefixes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, counterpart, end in _counterparts(tensors, base):
        by_prefixes[name.removesuffix(end), counterpart.removesuffix(end)].append(name)
    for (prefix, base_prefix), names in sorted(by_prefixes.items(), key=lambda item: -len(item[1])):
        rename |= _entry(prefix, base_prefix, names, tensors)
    try:
        names_after = new_names("", tensors, rename).values()
    except CheckpointError:
        return {}
    return rename if has_most_names(names_after, base) else {}


def has_most_names(names: Iterable[str], base: Mapping[str, Info]) -> bool:
    """Whether at least half of an expert's names, or of the base's, are in both."""
    expert_names = set(names)
    return 2 * len(expert_names & base.keys()) >= min(len(expert_names), len(base))


def written(rename: Mapping[str, str]) -> str:
    """The entries as YAML in one line."""
    return "{" + ", ".join(f"'{pattern}': '{template}'" for pattern, template in rename.items()) + "}"


def _counterparts(tensors: Mapping[str, Info], base: Mapping[str, Info]) -> Iterator[tuple[str, str, str]]:
    """Yields the tensors of an expert that the base has under one other name, with that name and their common end."""
    by_end: dict[str, list[str]] = defaultdict(list)
    for name in base.keys() - tensors.keys():
        for end in _ends(name):
            by_end[end].append(name)
    for name in tensors.keys() - base.keys():
        for end in _ends(name):
            fitting = [candidate for candidate in by_end.get(end, ()) if _fits(tensors[name], base[candidate])]
            if fitting:
                if len(fitting) == 1:
                    yield name, fitting[0], end
                break


def _ends(name: str) -> Iterator[str]:
    """The ends of a name that begin with one of its parts, the longest first."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts) - _SHORTEST + 1))


def _fits(info: Info, base: Info) -> bool:
    """Whether two tensors can be one: in one shape, or tables with more rows in one model than in the other."""
    return len(info.shape) == len(base.shape) and (info.shape == base.shape or info.shape[1:] == base.shape[1:] != ())


def _entry(prefix: str, base_prefix: str, names: list[str], tensors: Mapping[str, Info]) -> dict[str, str]:
    """An entry that replaces a prefix, of these names alone where others begin with it too."""
    modules = sorted({name.removeprefix(prefix).partition(".")[0] for name in names})
    others = (name for name in tensors if name.startswith(prefix))
    if all(name.removeprefix(prefix).partition(".")[0] in modules for name in others):
        return {f"^{re.escape(prefix)}": base_prefix}
    if len(modules) == 1:
        return {f"^{re.escape(f'{prefix}{modules[0]}.')}": f"{base_prefix}{modules[0]}."}
    alternatives = "|".join(map(re.escape, modules))
    return {f"^{re.escape(prefix)}({alternatives})\\.": f"{base_prefix}\\1."}
