"""A transformers model of a checkpoint, built without its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import accelerate
import transformers
from torch import nn

from merger.checkpoint.model_class import model_constructor
from merger.checkpoint.tensor_kinds import tensor_kinds
from merger.errors import CheckpointError, checkpoint_faults

if TYPE_CHECKING:
    from merger.checkpoint.checkpoint import Checkpoint


def build(weights: Checkpoint, *, trust_remote_code: bool) -> Any:
    """The model that config.json describes, in evaluation mode: parameters on the meta device, buffers real."""
    with checkpoint_faults(f"{weights.label}: transformers cannot read its config.json"):
        config = transformers.AutoConfig.from_pretrained(weights.directory, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{weights.label}: {config.model_type} has an encoder and a decoder, and is not supported"
        )
    config._experts_implementation = "eager"  # one product per expert, as the input observer needs it (transformers 5)
    for part in (config, config.get_text_config()):
        part.use_cache = False
        part.tie_word_embeddings = _ties_head(weights, getattr(part, "tie_word_embeddings", False))
    with checkpoint_faults(f"{weights.label}: transformers cannot build the model of its config.json"):
        with accelerate.init_empty_weights(include_buffers=False):
            model = model_constructor(config, weights.label, trust_remote_code=trust_remote_code)()
        model.tie_weights()
    return model.eval()


def _ties_head(weights: Checkpoint, word: bool) -> bool:
    """Whether the checkpoint's head is its embedding, or the config's ``word`` where it stores neither or no head."""
    kinds = tensor_kinds(weights.tensors, weights.config, weights.equal)
    return kinds.tied or (word and (kinds.head is None or kinds.embedding is None))


def block_list(model: nn.Module) -> str | None:
    """The name of the list that holds the transformer blocks: that with the most weights in it."""
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in outer_lists(model)}
    return max(sizes, key=lambda name: sizes[name], default=None)


def outer_lists(model: nn.Module) -> list[str]:
    """The names of a model's lists of modules that are not inside another."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
    return lists
