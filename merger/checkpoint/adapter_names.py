"""Which of a model's tensors an adapter changes, and how: the names that peft stored, by the model's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merger.checkpoint.adapter_config import CONFIG, has_copy, scale_of, token_indices
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.tensor_info import Info

PREFIX = "base_model.model."

_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta")
# peft's modules around a module: its trained copy, or what it was, perhaps with rows for new tokens
_COPY = re.compile(r"(.+?)\.modules_to_save(?:\.default)?\.(.+)")
_ORIGINAL = re.compile(r"(.+?)\.(?:original_module|(?:token_adapter\.)?base_layer)\.(.+)")
# Modules around a language or a vision model, which checkpoints nest otherwise than the model in memory does.
_NESTING = {"model", "language_model", "text_model", "vision_model"}


def factor_names(module: str) -> tuple[str, str]:
    """Returns peft's names of lora_A and lora_B of a module of the model in memory."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


@dataclass(frozen=True)
class Change:
    """The adapter's change of one weight: scale·B·A, or its transpose."""

    down: str  # lora_A [rank, in], by the adapter's name of it
    up: str  # lora_B [out, rank]
    scale: float
    transposed: bool  # the weight is stored [in, out]


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that the adapter replaces."""

    tensor: str  # [rows, columns], by the adapter's name of it
    indices: tuple[int, ...]


@dataclass
class AdapterMatch:
    """The changes and replacements of a model's tensors by an adapter, by the model's names."""

    tensors: dict[str, Info]  # all of the model's; those that the adapter stores whole are the adapter's
    changes: dict[str, Change]
    rows: dict[str, TokenRows]

    def tells_apart(self, tensor: str, twin: str) -> bool:
        """Whether the adapter makes two tensors of one."""
        parts: tuple[Mapping[str, object], ...] = (self.tensors, self.changes, self.rows)
        return any(part.get(tensor) != part.get(twin) for part in parts)

    def drop(self, name: str) -> None:
        """Forgets a tensor."""
        self.tensors.pop(name, None)
        self.changes.pop(name, None)
        self.rows.pop(name, None)


@dataclass
class _WholeTensors:
    """Tensors that an adapter stores whole, by the model's names."""

    copies: dict[str, Info] = field(default_factory=dict)  # trained apart from what is tied to the tensor
    replaced: dict[str, Info] = field(default_factory=dict)
    originals: dict[str, Info] = field(default_factory=dict)  # what another change is made to

    def overlay(self, tensors: Mapping[str, Info], tied: Sequence[str]) -> dict[str, Info]:
        """Returns the model's tensors with the adapter's replacements; that of one tensor in ``tied`` replaces all."""
        stored = {**self.originals, **self.replaced}
        replacement = next((stored[name] for name in tied if name in stored), None)
        table = {} if replacement is None else dict.fromkeys(tied, replacement)
        return {**tensors, **table, **stored, **self.copies}


def match_adapter(tensors: Mapping[str, Info], tied: Sequence[str], adapter: Checkpoint) -> AdapterMatch:
    """Finds which of a model's ``tensors`` each tensor of the adapter changes, and how.

    ``tied`` are names of one tensor, the input embedding first. As in peft a trained copy of it, or LoRA on it, leaves
    the others as they were (with ensure_weight_tying peft stores the change for each), while rows for single tokens
    change all of them.
    ValueError for a tensor of the adapter that belongs to none of the model's, or does not fit.
    """
    find = name_finder(tensors)
    stored = _WholeTensors()
    modules: dict[str, dict[str, str]] = {}  # lora_A and lora_B of each
    rows: dict[str, TokenRows] = {}
    for key, info in adapter.tensors.items():
        if not info.is_float:
            raise ValueError(f"{key} holds {info.dtype}; expected a float")
        if factor := _FACTOR.fullmatch(key):
            modules.setdefault(factor[1], {})[factor[2]] = key
        elif tokens := _TOKENS.fullmatch(key):
            _add(rows, find(f"{tokens[1]}.weight"), TokenRows(key, token_indices(adapter.config, tokens[1])), key)
        else:
            _add_tensor(stored, find, key, info, adapter)
    overlay = stored.overlay(tensors, tied)
    changes = _changes(modules, find, overlay, adapter)
    for name in tied[1:]:
        rows |= {name: rows[tied[0]]} if tied[0] in rows and name not in rows else {}
    for name, tokens_rows in rows.items():
        _check_rows(name, tokens_rows, overlay[name], adapter.tensors[tokens_rows.tensor], name in changes)
    return AdapterMatch(overlay, changes, rows)


def name_finder(names: Iterable[str]) -> Callable[[str], str]:
    """Finds the model's tensor that a key of an adapter means.

    Either may lead with a module that the other lacks (`transformer.`), or nest the language and the vision model of a
    vision-language model otherwise: `model.language_model.layers.0...` is `language_model.model.layers.0...`.
    """
    tensors = frozenset(names)
    shorter: dict[str, list[str]] = {}
    unnested: dict[str, list[str]] = {}
    for name in tensors:
        shorter.setdefault(name.partition(".")[2], []).append(name)
        unnested.setdefault(_unnested(name), []).append(name)

    def find(key: str) -> str:
        name = key.removeprefix(PREFIX)
        spellings = [name], [name.partition(".")[2]], shorter.get(name, []), unnested.get(_unnested(name), [])
        for candidates in spellings:
            if len(candidates) == 1 and candidates[0] in tensors:
                return candidates[0]
        raise ValueError(f"{key} belongs to no tensor of the model; give the model that it was trained on")

    return find


def _unnested(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _NESTING)


def _add_tensor(stored: _WholeTensors, find: Callable[[str], str], key: str, info: Info, adapter: Checkpoint) -> None:
    """Adds a tensor that is stored whole."""
    if original := _ORIGINAL.fullmatch(key):
        _add(stored.originals, find(f"{original[1]}.{original[2]}"), info, key)
    elif copy := _COPY.fullmatch(key):
        name = f"{copy[1]}.{copy[2]}"
        if name not in adapter.tensors:  # where it is, peft loads that
            _add(stored.copies, find(name), info, key)
    elif has_copy(adapter.config, key.rpartition(".")[0]):
        _add(stored.copies, find(key), info, key)
    else:
        _add(stored.replaced, find(key), info, key)


def _add(matches: dict[str, Any], name: str, match: Any, key: str) -> None:
    if name in matches:
        raise ValueError(f"{key} and another both belong to {name} of the model")
    matches[name] = match


def _check_rows(name: str, rows: TokenRows, table: Info, stored: Info, changed: bool) -> None:
    """ValueError unless there is a row for each index, and for each index a place in the table."""
    if changed:
        raise ValueError(f"{name} has trainable tokens and LoRA, which merger cannot add; merge it with peft first")
    if stored.shape != (len(rows.indices), *table.shape[1:]):
        raise ValueError(
            f"{rows.tensor} is {list(stored.shape)}, but {CONFIG} has {len(rows.indices)} trainable_token_indices"
        )
    if rows.indices and not 0 <= min(rows.indices) <= max(rows.indices) < table.shape[0]:
        raise ValueError(f"{CONFIG} names token {max(rows.indices)}, but {name} has {table.shape[0]} rows")


# --- factors ---


def _changes(
    modules: Mapping[str, Mapping[str, str]],
    find: Callable[[str], str],
    tensors: Mapping[str, Info],
    adapter: Checkpoint,
) -> dict[str, Change]:
    """The change of each weight, by the model's name of it."""
    fits: dict[str, tuple[str, list[bool]]] = {}
    for module, keys in modules.items():
        if keys.keys() != {"A", "B"}:
            raise ValueError(f"{module} has lora_{next(iter(keys))} alone; expected lora_A and lora_B")
        name = find(f"{module}.weight")
        fits[module] = name, _orientations(module, keys, adapter, name, tensors[name])
    # GPT-2 stores its weights [in, out]. A square one does not show it, but another of its name may (c_proj).
    orientation = {
        _leaf(name): orientations[0]
        for module, (name, orientations) in fits.items()
        if len(orientations) == 1 and not _is_table(modules[module])
    }
    flag = bool(adapter.config.get("fan_in_fan_out"))
    changes: dict[str, Change] = {}
    for module, (name, orientations) in fits.items():
        if len(orientations) == 2 and _leaf(name) not in orientation and not {flag}.issuperset(orientation.values()):
            raise ValueError(f"{module} is square: {CONFIG} does not tell if it is stored transposed")
        transposed = orientations[0] if len(orientations) == 1 else orientation.get(_leaf(name), flag)
        down, up = modules[module]["A"], modules[module]["B"]
        scale = scale_of(adapter.config, module.removeprefix(PREFIX), adapter.tensors[down].shape[0])
        _add(changes, name, Change(down, up, scale, transposed), module)
    return changes


def _orientations(module: str, keys: Mapping[str, str], adapter: Checkpoint, name: str, weight: Info) -> list[bool]:
    """The ways, transposed or not, in which B·A fits the weight."""
    down, up = adapter.tensors[keys["A"]].shape, adapter.tensors[keys["B"]].shape
    if len(down) > 2:
        raise ValueError(f"{module} is LoRA on a convolution, which merger cannot add; merge it with peft first")
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise ValueError(f"{module}: lora_B {list(up)} and lora_A {list(down)} have no product")
    product = (up[0], down[1])
    possible = [True] if _is_table(keys) else [False, True]
    fitting = [transposed for transposed in possible if weight.shape == product[:: -1 if transposed else 1]]
    if not fitting:
        raise ValueError(f"{module}: B·A is {list(product)}, but {name} is {list(weight.shape)}")
    return fitting


def _is_table(keys: Mapping[str, str]) -> bool:
    """Whether the factors are those of an embedding, which is stored [in, out] everywhere."""
    return ".lora_embedding_" in keys["A"]


def _leaf(name: str) -> str:
    """The module's own name: c_proj of h.0.mlp.c_proj.weight."""
    return f".{name}".rsplit(".", 2)[-2]
