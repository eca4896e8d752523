"""The linear layers of the model in memory that a LoRA adapter can change, by the checkpoint's names."""

from __future__ import annotations

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.tensor_kinds import tensor_kinds
from merger.errors import CheckpointError


def linear_modules(base: Checkpoint, *, trust_remote_code: bool) -> dict[str, str]:
    """Returns the linear layers that an adapter can change: the module's name by the checkpoint's weight name."""
    from merger.calibration.model import build
    from merger.checkpoint.parameter_names import locate

    model = build(base, trust_remote_code=trust_remote_code)
    is_tied = tensor_kinds(base.tensors, base.config, base.equal).tied
    tied = model.get_output_embeddings() if is_tied else None
    groups = locate(model, base.tensors, base.original_names)
    modules = {}
    for name, module in model.named_modules():
        group = groups.get(f"{name}.weight")
        if type(module).__name__ in ("Linear", "Conv1D") and module is not tied and group is not None:
            sources = [source for _, source in group.names]
            if len(sources) == 1 and group.converter is None:
                modules[sources[0]] = name
    if not modules:
        raise CheckpointError("base: has no linear layer that an adapter could change")
    return modules
