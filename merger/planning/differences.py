"""Differences between the inputs, as notes or faults: architectures, settings of configs, tokenizers."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from merger.checkpoint.checkpoint import Checkpoint
from merger.checkpoint.tensor_kinds import text_config
from merger.checkpoint.tokenizers import Tokenizer, splitting_differences
from merger.planning.proposed_rename import has_most_names, proposed_rename, written
from merger.planning.towers import is_multimodal
from merger.recipe.sections import Source

_NOISE = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "architectures",
    "use_cache",
    "vocab_size",
}


_SIZES = (
    "num_hidden_layers", "n_layer", "hidden_size", "n_embd", "d_model", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_local_experts", "num_experts",
)  # fmt: skip


def summarize_misfits(
    faults: Sequence[str],
    models: Mapping[str, Checkpoint],
    free_sizes: Container[str] = (),
    sources: Mapping[str, Source] = MappingProxyType({}),
) -> list[str]:
    """The faults of a plan, with one line in place of all misfits of an expert that is not a fine-tune of the base.

    The line says which `rename` would make it one, or else how its architecture differs. ``free_sizes`` are keys of
    config.json in which an expert may differ; ``sources`` are the experts as the recipe writes them.
    Faults that name no expert are left out where there is such an expert: they may follow from it.
    """
    labels = dict.fromkeys(fault.partition(": ")[0] for fault in faults)
    lines = {
        label: line
        for label, model in models.items()
        if label in labels
        and (line := _other_names(model, models["base"], sources) or _other_architecture(model, models, free_sizes))
    }
    if not lines:
        return list(faults)
    experts = models.keys() - lines.keys()
    return [*lines.values(), *(fault for fault in faults if fault.partition(": ")[0] in experts)]


def _other_names(model: Checkpoint, base: Checkpoint, sources: Mapping[str, Source]) -> str | None:
    """The fault of an expert that has the base's tensors under other names, with the entry of a recipe that says so.

    None for an expert of another type, unless one of the two is a language model with towers beside it.
    """
    source = sources.get(model.label)
    is_same_type = model.config.get("model_type") == base.config.get("model_type")
    if source is None or not (is_same_type or is_multimodal(model.config) != is_multimodal(base.config)):
        return None
    rename = proposed_rename(model.tensors, base.tensors)
    if not rename:
        return None
    entry = source.model_copy(update={"rename": {**source.rename, **rename}})
    return f"{model.label}: names its tensors otherwise than the base; write {model.label}: {_entry(entry)}"


def _entry(source: Source) -> str:
    """An input as one line of YAML."""
    keys = source.model_dump(mode="json", exclude={"rename"}, exclude_defaults=True)
    return f"{{{', '.join(f'{key}: {value}' for key, value in keys.items())}, rename: {written(source.rename)}}}"


def _other_architecture(model: Checkpoint, models: Mapping[str, Checkpoint], free_sizes: Container[str]) -> str | None:
    """The fault of an expert of another architecture, unless a recipe has given its tensors the base's names."""
    base = models["base"]
    difference = _architecture_difference(base.config, model.config, free_sizes)
    if difference is None or (model.original_names and has_most_names(model.tensors, base.tensors)):
        return None
    return f"{model.label} {difference}; experts are fine-tunes of the base"


def _architecture_difference(
    base: Mapping[str, Any], config: Mapping[str, Any], free_sizes: Container[str]
) -> str | None:
    """How the architecture of a config differs from that of the base; None where type and sizes are the same."""
    kinds = config.get("model_type"), base.get("model_type")
    if kinds[0] != kinds[1]:
        return f"is {kinds[0] or 'without a model_type'}, base is {kinds[1] or 'without a model_type'}"
    sizes, base_sizes = text_config(config), text_config(base)
    keys = [key for key in _SIZES if key not in free_sizes and sizes.get(key) != base_sizes.get(key)]
    if not keys:
        return None
    return (
        f"is {kinds[0]} with {', '.join(f'{key} {sizes.get(key)}' for key in keys)}, "
        f"base with {', '.join(f'{key} {base_sizes.get(key)}' for key in keys)}"
    )


def config_differences(models: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Notes on settings of config.json in which an expert differs from the base."""
    for label, model in list(models.items())[1:]:
        config: Mapping[str, Any] = model.config
        base: Mapping[str, Any] = models["base"].config
        if is_multimodal(config) != is_multimodal(base):
            config, base = text_config(config), text_config(base)
        changed = [
            f"{key} {base.get(key)!r} -> {config.get(key)!r}"
            for key in sorted((set(base) | set(config)) - _NOISE)
            if base.get(key) != config.get(key)
        ]
        if changed:
            yield f"{label}: config differs from the base: {'; '.join(changed)[:300]}"


def tokenizer_differences(tokenizers: Mapping[str, Tokenizer], label: str, added: Mapping[int, str]) -> Iterator[str]:
    """Yields notes on parts of the other tokenizers that the output lacks.

    It has the tokenizer of the model ``label`` with ``added`` tokens.
    """
    output = tokenizers[label]
    tokens = {**output.tokens, **added}
    for model, tokenizer in tokenizers.items():
        if not output.exists or tokenizer.digest == output.digest:
            continue
        if not tokenizer.exists:
            yield f"{model}: has no tokenizer; its rows are taken for the tokens that the other models have there"
        elif not (tokenizer.is_readable and output.is_readable):
            if tokenizer.vocabulary_digest != output.vocabulary_digest:
                yield f"{model}: its tokenizer is not that of {label}, and their tokens cannot be compared"
        else:
            source = f"which gets the tokenizer of {label}"
            token_source = "which has the tokens of all models" if added else source
            yield from (f"{model}: {note}, {token_source}" for note in _token_notes(tokenizer, tokens))
            parts = ", ".join(_differing_settings(tokenizer, output))
            advice = f"; `output: {{tokenizer: {model}}}` takes its own" if tokenizer.tokens == tokens else ""
            if parts:
                yield f"{model}: its tokenizer differs from that of the output, {source}, in {parts}{advice}"


def _token_notes(tokenizer: Tokenizer, tokens: Mapping[int, str]) -> Iterator[str]:
    names = set(tokens.values())
    changed = [(i, token) for i, token in sorted(tokenizer.tokens.items()) if tokens.get(i) != token]
    lost = [f"{token!r} ({i})" for i, token in changed if token not in names]
    if lost:
        count = f" and {len(lost) - 5:,} more" if len(lost) > 5 else ""
        yield f"its tokens {', '.join(lost[:5])}{count} are not in the output"
    if moved := len(changed) - len(lost):
        yield f"{moved:,} of its tokens have other ids in the output"


def _differing_settings(tokenizer: Tokenizer, output: Tokenizer) -> Iterator[str]:
    yield from splitting_differences(tokenizer, output)
    if tokenizer.chat_templates != output.chat_templates:
        yield "chat template"
    for key in {**tokenizer.special_tokens, **output.special_tokens}:
        token, output_token = tokenizer.special_tokens.get(key), output.special_tokens.get(key)
        if token != output_token:
            yield f"{key} ({token!r} instead of {output_token!r})"
