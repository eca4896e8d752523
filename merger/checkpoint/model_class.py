"""The class of transformers that a checkpoint's config.json describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from merger.errors import CheckpointError


def model_constructor(config: Any, label: str, *, trust_remote_code: bool) -> Callable[[], Any]:
    """Returns the constructor of the model: its own class, or trusted remote code; CheckpointError if there is none."""
    import transformers

    remote = getattr(config, "auto_map", None) or {}
    if not (trust_remote_code and remote):
        for name in config.architectures or ():
            if hasattr(transformers, name):
                return lambda: getattr(transformers, name)(config)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping or (trust_remote_code and auto.__name__ in remote):
            return lambda: auto.from_config(config, trust_remote_code=trust_remote_code)
    raise CheckpointError(
        f"{label}: transformers {transformers.__version__} has no {' or '.join(config.architectures or ['model'])} "
        f"for {config.model_type}; if its code is in the repository and you trust it, allow remote code"
    )
