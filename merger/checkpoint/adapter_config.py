"""adapter_config.json: whether merger can add such an adapter, its scales and copies, and one for new factors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

CONFIG = "adapter_config.json"

# Each of these changes what the factors mean, or what the base's own weights are.
_BEYOND_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias in lora_B",
    "target_parameters": "LoRA on bare parameters, such as packed experts",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Of the others (pissa, olora, corda, loftq, ...) training began from other base weights than the model's.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

_COMMIT = re.compile(r"[0-9a-f]{40}")


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why an adapter is more than W + scale·B·A and whole tensors: a sentence without its subject, or None."""
    kind = config.get("peft_type")
    if kind != "LORA":
        return f"is a PEFT adapter of type {kind}, not LORA"
    for key, feature in _BEYOND_LORA.items():
        if config.get(key):
            return f"uses {feature} ({key})"
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        return f"was trained from changed base weights (init_lora_weights: {start})"
    return None


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rslora; a pattern that matches the module overrides alpha and rank."""
    configured_rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if configured_rank != rank:
        raise ValueError(f"{module} has rank {rank}, but {CONFIG} says {configured_rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"{CONFIG} has no lora_alpha")
    return float(alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that ends the module's name at a dot, as in peft."""
    if not isinstance(patterns, dict | None):
        raise ValueError(f"a pattern in {CONFIG} is no JSON object")
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def has_copy(config: Mapping[str, Any], module: str) -> bool:
    """Whether peft trained a copy of the module's weights, which leaves a tensor tied to them as it was."""
    modules = config.get("modules_to_save")
    modules = modules if isinstance(modules, list) else []
    return any(isinstance(end, str) and module.endswith(end) for end in modules)


def token_indices(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The rows of an embedding that were trained alone."""
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((rows for end, rows in indices.items() if module.endswith(end)), None)
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise ValueError(f"{CONFIG} has no list of trainable_token_indices for {module}")
    return tuple(indices)


def other_base(config: Mapping[str, Any], names: Iterable[str], commit: str | None) -> str | None:
    """The model that the adapter was trained on, unless ``names``, of a model at ``commit``, have it among them.

    A name is compared by its last part: a model is moved and mirrored more often than it is renamed.
    """
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        return None
    other_commit = isinstance(revision, str) and _COMMIT.fullmatch(revision) and commit and commit != revision
    if _last_part(base) in map(_last_part, names) and not other_commit:
        return None
    return f"{base}@{revision}" if revision else base


def _last_part(name: str) -> str:
    """llama-2-7b of meta-llama/Llama-2-7b, of a path to it, and of its folder in the Hub's cache."""
    name = re.sub(r".*models--.*--(.+)/snapshots/.*", r"\1", name.partition("@")[0])
    return name.rstrip("/").rpartition("/")[2].lower()


def lora_config(base: str, ranks: Mapping[str, int], *, on_hub: bool, fan_in_fan_out: bool) -> dict[str, Any]:
    """The config of an adapter for the model ``base``, given the rank of each module; every scale is 1.

    ``on_hub`` says that the model is a repository of the Hub, perhaps with a revision behind an @, which peft has
    under a key of its own; ``fan_in_fan_out`` says that the model stores its weights [in, out].
    """
    name, _, revision = base.partition("@") if on_hub else (base, "", "")
    rank = max(ranks.values())
    exceptions = {module: lower for module, lower in ranks.items() if lower != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        **({"revision": revision} if revision else {}),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": exceptions,
        "alpha_pattern": exceptions,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
