"""Refusing models that are none of transformers', with what they are and what to do instead."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

GGUF = ".gguf"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".npz")
GGUF_REMEDY = "merge the safetensors folder that it was made from, and convert the result again"
_PIPELINE, _DIFFUSERS = "model_index.json", "diffusion_pytorch_model"


def foreign_model(names: Collection[str], directory: Path) -> str | None:
    """The end of a sentence on a folder with these files that is no model of transformers; None if it may be one."""
    weights = [name for name in names if name.endswith((GGUF, *_WEIGHTS))]
    if weights and all(name.endswith(GGUF) for name in weights):
        return f"holds {min(weights)}, weights in GGUF, which is made for inference and is not merged; {GGUF_REMEDY}"
    if _PIPELINE in names or any(name.startswith(_DIFFUSERS) for name in names):
        kind = _class_name(directory / (_PIPELINE if _PIPELINE in names else "config.json")) or "model"
        return (
            f"is a {kind} of diffusers, and merger merges models of transformers; in Python, merger.merge_tensors "
            "merges the tensors of any safetensors files"
        )
    return None


def _class_name(file: Path) -> str | None:
    """The class that a configuration of diffusers names; None if it cannot be read or names none."""
    try:
        content: Any = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    name = content.get("_class_name") if isinstance(content, dict) else None
    return name if isinstance(name, str) and name.isidentifier() else None
