"""Settings in which the inputs' configs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from merger.checkpoint.checkpoint import Checkpoint

_NOISE = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "architectures",
    "use_cache",
    "vocab_size",
}


def differences(models: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Config keys and tokenizers in which an expert differs from the base."""
    base = models["base"]
    for label, model in list(models.items())[1:]:
        changed = [
            f"{key} {base.config.get(key)!r} -> {model.config.get(key)!r}"
            for key in sorted((set(base.config) | set(model.config)) - _NOISE)
            if base.config.get(key) != model.config.get(key)
        ]
        if changed:
            yield f"{label}: config differs from the base: {'; '.join(changed)[:300]}"
        if _differs(base.directory / "tokenizer.json", model.directory / "tokenizer.json"):
            yield f"{label}: its tokenizer differs from the base's"


def _differs(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes()
