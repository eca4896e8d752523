"""The model's own tensor names, without the parts that PyTorch's wrappers add."""

from __future__ import annotations

import re
from collections.abc import Iterable

# torch.compile, fully sharded data parallel, and activation checkpointing: no model names a module so.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# DistributedDataParallel's module could be a module of the model, if not every tensor lay in it. In an adapter it may
# stand within peft's own prefix.
_OUTER = ("", "base_model.model.")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """For every name of a checkpoint the model's own name of the tensor. ValueError where two tensors have the same."""
    model_names = {name: _WRAPPERS.sub("", name) if "_mod" in name else name for name in names}
    for outer in _OUTER:
        prefix = f"{outer}module."
        while model_names and all(name.startswith(prefix) for name in model_names.values()):
            model_names = {stored: outer + name.removeprefix(prefix) for stored, name in model_names.items()}
    stored_names: dict[str, str] = {}
    for stored, name in model_names.items():
        if (first := stored_names.setdefault(name, stored)) != stored:
            raise ValueError(f"holds {name} twice, as {first} and as {stored}; remove one of them")
    return model_names
