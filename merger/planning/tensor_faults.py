"""The faults of one tensor: models that lack it, or that hold it in another dtype or shape."""

from __future__ import annotations

from collections.abc import Mapping

from merger.checkpoint.tensor_info import Info

_REMEDY = "name it in a rule {tensors: ..., use: base}"


def missing_faults(name: str, reads: Mapping[str, str | None], *, zero: bool) -> list[str]:
    """A fault for every model that lacks a tensor; with ``zero`` experts may, as their difference is then zero."""
    missing = [label for label, read in reads.items() if read is None]
    if "base" not in missing and zero:
        return []
    return [
        f"{label}: has no {name}; set `missing: zero` to leave such tensors at the base, "
        f"or name them in a rule {{tensors: ..., use: base}}"
        for label in missing
    ]


def shape_faults(name: str, infos: Mapping[str, Info], *, is_table: bool) -> list[str]:
    """A fault for every model whose dtype or shape does not fit the base's; tables may differ in their rows."""
    base = infos["base"]
    integers = [label for label, info in infos.items() if not info.is_float]
    if integers:
        return [
            f"{label}: {name} holds {infos[label].dtype}, but {base.dtype} in base; {_REMEDY}" for label in integers
        ]
    if is_table and len({info.shape[1:] for info in infos.values()}) == 1:
        return []
    return [
        f"{label}: {name} is {list(info.shape)}, but {list(base.shape)} in base; {_REMEDY}"
        for label, info in infos.items()
        if info.shape != base.shape
    ]
