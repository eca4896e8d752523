"""A PEFT LoRA adapter on top of a checkpoint: every weight it changes is W + scale·B·A, a few rows at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger._lazy import torch
from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.tensor_info import Info
from merger.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"

# Rows of one product. Always the same rows are multiplied at once, because BLAS gives a row other bits in
# another company: of 1000 numbers, 390 differed when their row was multiplied alone (MKL 2024, rank 4).
BLOCK = 64

# Each of these changes what the factors mean, or what the base's own weights are.
_BEYOND_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias in lora_B",
    "target_parameters": "LoRA on bare parameters, such as packed experts",
    "trainable_token_indices": "trainable tokens",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Of the others (pissa, olora, corda, loftq, ...) training began from other base weights than the model's.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_WRAPPER = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)\.")  # peft's, around a whole module
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Change:
    """What the adapter adds to one weight: scale·B·A, or the transpose of it."""

    down: str  # lora_A [rank, in], by the adapter's name of it
    up: str  # lora_B [out, rank]
    scale: float
    transposed: bool  # the weight is stored [in, out]


class Adapted(Checkpoint):
    """A checkpoint with an adapter on it: the same tensors, of which some read as float32."""

    adapter: Checkpoint

    def __init__(self, model: Checkpoint, adapter: Checkpoint, base: Checkpoint | None = None) -> None:
        check_config(adapter.config, adapter)
        replaced, self.changes = _match(model, adapter)
        super().__init__(model.label, model.directory, {**model.tensors, **replaced}, model.config, commit=model.commit)
        self.adapter = adapter
        # Where the model is the base itself, the difference from it is the change, not (W + BA) - W.
        self._on_base = frozenset(
            name for name in self.changes if type(base) is Checkpoint and base.tensors.get(name) == self.tensors[name]
        )
        self._factors = lru_cache(8)(self._read_factors)

    @property
    def files(self) -> list[Path]:
        """The weight files of the model, and all that says what the adapter adds: its config holds the scale."""
        return sorted({*super().files, *self.adapter.files, self.adapter.directory / CONFIG})

    def dtype(self, name: str) -> torch.dtype:
        """float32 where the adapter changes a tensor, else as stored."""
        return torch.float32 if name in self.changes else super().dtype(name)

    def read_into(self, rows: Tensor, name: str, start: int, stop: int) -> None:
        """Reads rows of W, or of W + scale·B·A, into ``rows``."""
        super().read_into(rows, name, start, stop)
        if name in self.changes:
            rows += self._change(name, start, stop)

    def change_rows(self, name: str, start: int, stop: int) -> Tensor | None:
        """Rows of scale·B·A where the model under the adapter is the base itself."""
        return self._change(name, start, stop) if name in self._on_base else None

    def close(self) -> None:
        """Closes the files of both."""
        self._factors.cache_clear()
        self.adapter.close()
        super().close()

    def _change(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of scale·B·A."""
        left, right = self._factors(name)
        first = start - start % BLOCK
        blocks = [left[row : row + BLOCK] @ right for row in range(first, max(stop, first + 1), BLOCK)]
        return torch.cat(blocks)[start - first : stop - first].mul_(self.changes[name].scale)

    def _read_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The change of a weight as a product [rows, rank] @ [rank, columns], still without its scale."""
        change = self.changes[name]
        down, up = self.adapter.read(change.down).float(), self.adapter.read(change.up).float()
        return (down.T.contiguous(), up.T.contiguous()) if change.transposed else (up, down)


# --- what the config says ---


def check_config(config: Mapping[str, Any], adapter: Checkpoint) -> None:
    """CheckpointError unless W + scale·B·A is all there is to it."""
    kind = config.get("peft_type")
    if kind != "LORA":
        _refuse(adapter, f"is a PEFT adapter of type {kind}, not LORA")
    for key, said in _BEYOND_LORA.items():
        if config.get(key):
            _refuse(adapter, f"uses {said} ({key})")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        _refuse(adapter, f"was trained from changed base weights (init_lora_weights: {start})")


def _refuse(adapter: Checkpoint, what: str) -> None:
    raise CheckpointError(
        f"{adapter.label} {what}, which merger cannot add to a model; "
        "merge it with peft's merge_and_unload, and give the model that comes of it"
    )


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rslora, by the patterns' word on the module."""
    said = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if said != rank:
        raise ValueError(f"{module} has rank {rank}, but {CONFIG} says {said}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"{CONFIG} has no lora_alpha")
    return float(alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that ends the module's name at a dot, as in peft."""
    if not isinstance(patterns, dict | None):
        raise ValueError(f"a pattern in {CONFIG} is no JSON object")
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


# --- which of the model's tensors it changes ---


def _match(model: Checkpoint, adapter: Checkpoint) -> tuple[dict[str, Info], dict[str, Change]]:
    """Whole tensors and changes, by the model's names; every tensor of the adapter is in one of them."""
    find = _finder(model.tensors)
    modules: dict[str, dict[str, str]] = {}  # A and B of each
    replaced: dict[str, Info] = {}
    try:
        for key, info in adapter.tensors.items():
            if not info.is_float:
                raise ValueError(f"{key} holds {info.dtype}; expected a float")
            if factor := _FACTOR.fullmatch(key):
                modules.setdefault(factor[1], {})[factor[2]] = key
            else:
                _add(replaced, find(_WRAPPER.sub(".", key)), info, key)
        changes = _changes(modules, find, {**model.tensors, **replaced}, adapter)
    except (ValueError, OverflowError, re.error) as error:
        raise CheckpointError(f"{adapter.label}: {error}") from None
    return replaced, changes


def _finder(tensors: Mapping[str, Info]) -> Callable[[str], str]:
    """Finds the model's tensor that the adapter means; either may lead with a `model.` that the other lacks."""
    shorter: dict[str, list[str]] = {}
    for name in tensors:
        shorter.setdefault(name.partition(".")[2], []).append(name)

    def find(key: str) -> str:
        name = key.removeprefix(_PREFIX)
        for candidates in ([name], [name.partition(".")[2]], shorter.get(name, [])):
            if len(candidates) == 1 and candidates[0] in tensors:
                return candidates[0]
        raise ValueError(f"{key} belongs to no tensor of the model; give the model that it was trained on")

    return find


def _changes(
    modules: Mapping[str, Mapping[str, str]],
    find: Callable[[str], str],
    tensors: Mapping[str, Info],
    adapter: Checkpoint,
) -> dict[str, Change]:
    """The change of each weight, by the model's name of it."""
    fits = {}
    for module, keys in modules.items():
        if keys.keys() != {"A", "B"}:
            raise ValueError(f"{module} has lora_{next(iter(keys))} alone; expected lora_A and lora_B")
        name = find(f"{module}.weight")
        fits[module] = name, _orientations(module, keys, adapter, name, tensors[name])
    # GPT-2 stores its weights [in, out]. A square one does not show it, but another of its name may (c_proj).
    shown = {
        _leaf(name): ways[0]
        for module, (name, ways) in fits.items()
        if len(ways) == 1 and not _is_table(modules[module])
    }
    flag = bool(adapter.config.get("fan_in_fan_out"))
    changes: dict[str, Change] = {}
    for module, (name, ways) in fits.items():
        if len(ways) == 2 and _leaf(name) not in shown and not {flag}.issuperset(shown.values()):
            raise ValueError(f"{module} is square: {CONFIG} does not tell if it is stored transposed")
        transposed = ways[0] if len(ways) == 1 else shown.get(_leaf(name), flag)
        down, up = modules[module]["A"], modules[module]["B"]
        scale = scale_of(adapter.config, module.removeprefix(_PREFIX), adapter.tensors[down].shape[0])
        _add(changes, name, Change(down, up, scale, transposed), module)
    return changes


def _add(found: dict[str, Any], name: str, what: Any, key: str) -> None:
    if name in found:
        raise ValueError(f"{key} and another both belong to {name} of the model")
    found[name] = what


def _orientations(module: str, keys: Mapping[str, str], adapter: Checkpoint, name: str, weight: Info) -> list[bool]:
    """The ways, transposed or not, in which B·A fits the weight."""
    down, up = adapter.tensors[keys["A"]].shape, adapter.tensors[keys["B"]].shape
    if len(down) > 2:
        raise ValueError(f"{module} is LoRA on a convolution, which merger cannot add; merge it with peft first")
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
        raise ValueError(f"{module}: lora_B {list(up)} and lora_A {list(down)} have no product")
    product = (up[0], down[1])
    possible = [True] if _is_table(keys) else [False, True]
    ways = [transposed for transposed in possible if weight.shape == product[:: -1 if transposed else 1]]
    if not ways:
        raise ValueError(f"{module}: B·A is {list(product)}, but {name} is {list(weight.shape)}")
    return ways


def _is_table(keys: Mapping[str, str]) -> bool:
    """Whether it is an embedding, which is stored [in, out] everywhere."""
    return ".lora_embedding_" in keys["A"]


def _leaf(name: str) -> str:
    """The module's own name: c_proj of h.0.mlp.c_proj.weight."""
    return f".{name}".rsplit(".", 2)[-2]
